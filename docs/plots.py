"""Plots of the documentation; each PNG carries a digest of its data and of the code behind it."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cut_cross_entropy.benchmark.methods import METHODS
from cut_cross_entropy.benchmark.shapes import SHAPES

COLORS = {
    "cce": "#c1272d", "cce_exact": "#e8833a", "chunked": "#b9a44c", "torch_compile": "#5b8c5a",
    "baseline": "#555555", "apple": "#3d6fb6", "liger": "#7d5ba6", "trl": "#4fa3a5",
    "torch": "#a0522d", "quack": "#d48bb5",
}  # fmt: skip
RUN_COLORS = {
    "full": "#f2b880",
    "cce": "#1b3a5c",
    "cce_exact": "#2a9d8f",
    "full_reordered": "#9a9a9a",
}
RUN_NAMES = {"full": "full logits", "full_reordered": "full logits, batch reversed"}
STYLE: dict[str, Any] = {
    "font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 110,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A plot that has not been drawn yet.

    Args:
        name: file name without ``.png``.
        draw: draws ``points`` into an empty matplotlib figure.
        points: everything the plot shows, as JSON values.
    """

    name: str
    draw: Callable[[Any, Any], None]
    points: Any

    @property
    def digest(self) -> str:
        """Hash of the points, the drawing function's source, and the names and colours of all."""
        shared = [COLORS, RUN_COLORS, RUN_NAMES, STYLE, [method_name(m) for m in METHODS]]
        code = inspect.getsource(self.draw) + inspect.getsource(log_axis)
        content = json.dumps([self.points, shared], sort_keys=True) + code
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def is_current(self, folder: Path) -> bool:
        """Whether ``folder`` holds this plot, drawn from the same points by the same code."""
        from PIL import Image

        path = folder / f"{self.name}.png"
        if not path.is_file():
            return False
        with Image.open(path) as image:
            return bool(image.info.get("Digest") == self.digest)

    def figure(self) -> Any:
        """Draw the plot."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure()
            self.draw(figure, self.points)
        return figure

    def save(self, folder: Path) -> Path:
        """Draw the plot into ``folder`` and return the path of the PNG."""
        path = folder / f"{self.name}.png"
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"Software": None, "Digest": self.digest}
        self.figure().savefig(path, dpi=STYLE["savefig.dpi"], metadata=metadata)
        return path


def short(device: str) -> str:
    """Return the name by which a GPU is known: ``NVIDIA H100 80GB HBM3`` is an H100."""
    return device.split()[1] if device.startswith("NVIDIA ") else device


def head(test_data: str) -> str:
    """Name the classifier and the data of a problem in words."""
    model, _, kind = test_data.rpartition("-")
    if model in SHAPES:
        return f"{SHAPES[model].title} head" + ("" if kind == "structured" else f", {kind} data")
    return {"smollm2": "SmolLM2 135M head, real text"}.get(test_data, test_data)


def method_name(method: str) -> str:
    """Name a method in a plot; those of this package that make no full logits are marked."""
    known = METHODS.get(method)
    if known is None:
        return method
    if method == "torch_compile":
        return "full logits, torch.compile"
    ours = known.package == "cut_cross_entropy" and not known.peer
    return known.title.replace("`", "") + " (this package)" * ours


def run_name(method: str) -> str:
    """Name the method of a training run in words."""
    return RUN_NAMES.get(method, method)


def log_axis(axis: Any, between: Sequence[float] = (2, 5)) -> None:
    """Write the numbers of a logarithmic axis out, those ``between`` powers of ten too."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis._set_axes_scale("log")
    axis.set_minor_locator(LogLocator(subs=between))
    for setter in (axis.set_major_formatter, axis.set_minor_formatter):
        setter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"))
    axis.set_tick_params(which="minor", labelsize=9)


def series(rows: pd.DataFrame, columns: Sequence[str]) -> dict[str, list[list[float]]]:
    """Return the values of the columns, a list of lists by method in the order of the benchmark."""
    groups = rows.groupby("method", observed=True)
    return {str(method): own[list(columns)].values.tolist() for method, own in groups}


def bars(rows: pd.DataFrame, name: str) -> Plot | None:
    """Time and memory of all methods on one problem."""
    if rows["method"].nunique() < 2:
        return None
    rows = rows.sort_values("runtime_ms")
    first = rows.iloc[0]
    points = {
        "title": f"{head(first['test_data'])}, {first['tokens']:,} tokens, "
        f"{first['dtype']}, {short(first['device'])}",
        "methods": list(rows["method"]),
        "ms": list(rows["runtime_ms"]),
        "mib": list(rows["op_mem_mb"]),
        "gemm_ms": None if pd.isna(first["gemm_ms"]) else first["gemm_ms"],
    }
    return Plot(name, draw_bars, points)


def draw_bars(figure: Any, points: dict[str, Any]) -> None:
    """Draw horizontal bars that start at 0, time on the left and memory on the right."""
    names = [method_name(method) for method in points["methods"]]
    figure.set_size_inches(11, 0.46 * len(names) + 1.6)
    axes = figure.subplots(1, 2, sharey=True)
    colors = [COLORS.get(method, "gray") for method in points["methods"]]
    sides = (("ms", ",.1f", "time of loss and both gradients, ms"),
             ("mib", ",.0f", "peak memory, gradients included, MiB"))  # fmt: skip
    for ax, (column, form, label) in zip(axes, sides, strict=True):
        shown = ax.barh(names, points[column], color=colors)
        texts = ax.bar_label(shown, [format(x, form) for x in points[column]], padding=3)
        for text in texts:  # a line behind a number must not cross it
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        ax.set(xlim=(0, max(points[column]) * 1.18), xlabel=label)
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.tick_params(axis="y", length=0)
    axes[0].invert_yaxis()
    if points["gemm_ms"] is not None:
        least = 3 * points["gemm_ms"]
        label = f"three matrix products e @ c.T\nby the vendor's library: {least:.1f} ms"
        axes[0].axvline(least, color="black", linewidth=1, linestyle=":", zorder=0.5, label=label)
        axes[0].legend(loc="upper right")
    figure.suptitle(points["title"])


def sweep(rows: pd.DataFrame, name: str, size: str) -> Plot | None:
    """Time and memory against the number of tokens or classes."""
    if rows["dim"].nunique() != 1 or rows.groupby("method", observed=True).size().max() < 3:
        return None
    rows, first = rows.sort_values(size), rows.iloc[0]
    alike = [shape.title for shape in SHAPES.values() if shape.dim == first["dim"]
             and (size == "classes" or shape.num_classes == first["classes"])]  # fmt: skip
    fixed = f"{first['classes']:,} classes" if size == "tokens" else f"{first['tokens']:,} tokens"
    points = {
        "title": f"{f'{alike[0]} head, ' if alike else ''}{fixed}, {first['dim']:,} features, "
        f"{first['dtype']}, {short(first['device'])}",
        "size": size,
        "series": series(rows, (size, "runtime_ms", "op_mem_mb")),
    }
    return Plot(name, draw_sweep, points)


def draw_sweep(figure: Any, points: dict[str, Any]) -> None:
    """Draw two panels with logarithmic axes, microseconds a token or class and memory."""
    figure.set_size_inches(11, 4.4)
    axes = figure.subplots(1, 2)
    unit = "token" if points["size"] == "tokens" else "class"
    for method, values in points["series"].items():
        n, ms, mib = np.array(values).T
        for ax, y in zip(axes, (1e3 * ms / n, mib), strict=True):
            # Wide and pale below narrow and dark, since several methods need the same memory.
            ax.plot(n, y, "o-", color=COLORS.get(method), label=method_name(method), alpha=0.85,
                    markersize=4, linewidth=4 if method == "baseline" else 1.8)  # fmt: skip
    ticks = sorted({row[0] for values in points["series"].values() for row in values})
    what = "tokens in a batch" if unit == "token" else "classes"
    labels = (f"loss and gradients, µs per {unit}", "peak memory, MiB")
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xscale("log", base=2)
        log_axis(ax.yaxis, (1.5, 2, 3, 4, 5, 7))
        ax.set_xticks(ticks, [f"{x / 1024:g}k" for x in ticks])
        ax.set(xlabel=f"{what} (log scale)", ylabel=f"{label} (log scale)")
    axes[1].legend(fontsize=10)
    figure.suptitle(points["title"])


def speed_error(rows: pd.DataFrame, name: str) -> Plot | None:
    """Time in matrix products against the error of dE, every problem measured."""
    rows = rows[rows["gemms"].notna() & rows["multiple_e"].notna()]
    if len(rows) < 2:
        return None
    first = rows.iloc[0]
    points = {
        "title": f"Each dot one problem: {rows['test_data'].nunique()} heads and kinds of data, "
        f"{first['dtype']}, {short(first['device'])}",
        "series": series(rows, ("gemms", "multiple_e")),
    }
    return Plot(name, draw_speed_error, points)


def draw_speed_error(figure: Any, points: dict[str, Any]) -> None:
    """Draw a scatter plot with logarithmic axes."""
    figure.set_size_inches(9, 5.6)
    ax = figure.subplots()
    for method, values in points["series"].items():
        ax.scatter(*zip(*values, strict=True), s=46, color=COLORS.get(method), alpha=0.8,
                   label=method_name(method))  # fmt: skip
    ax.axhline(1, color="black", linewidth=1, linestyle=":")
    ax.annotate("exact gradient, rounded to bfloat16", (1, 0.98), ha="right", va="top",
                xycoords=("axes fraction", "data"), fontsize=10)  # fmt: skip
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    ax.set(
        xlabel="time of loss and gradients in multiples of one matrix product e @ c.T\n"
        "by the vendor's library (log scale; left is faster)",
        ylabel="error of dE in multiples of the error of\nrounding it to bfloat16 (log scale)",
        title=points["title"],
    )
    figure.legend(loc="outside right upper", fontsize=10)


def by_seed(runs: pd.DataFrame, columns: Iterable[str] | str) -> dict[str, dict[str, Any]]:
    """Return values of training runs by method, those with a colour first, and seed."""
    order = [*RUN_COLORS, *runs["method"]]
    runs = runs.sort_values(["method", "seed"], key=lambda x: (
        x.map(order.index) if x.name == "method" else x))  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for method, seed, values in zip(runs["method"], runs["seed"], runs[columns].values.tolist(),
                                    strict=True):  # fmt: skip
        found.setdefault(method, {})[str(seed)] = values
    return found


def paired(losses: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return the losses of a method minus those of full logits, of each seed that both have."""
    full = losses["full"]
    return {seed: np.subtract(np.array(x, float), np.array(full[seed], float))
            for seed, x in losses[method].items() if seed in full}  # fmt: skip


def seeds(method: str, count: int) -> str:
    """Name a method of training runs and count its seeds."""
    return f"{run_name(method)}, {count} seed{'s' * (count > 1)}"


def curves(runs: pd.DataFrame, name: str, title: str, smooth: int) -> Plot:
    """Losses of training runs, by method and seed, and their distance from full logits.

    Args:
        runs: a row for each method and seed; full logits are the method ``full``.
        name: file name without ``.png``.
        title: says what was trained, on what.
        smooth: steps of the running mean; 1 for none.
    """
    points = {"title": title, "smooth": smooth, "losses": by_seed(runs, "losses")}
    return Plot(name, draw_curves, points)


def draw_curves(figure: Any, points: dict[str, Any]) -> None:
    """Draw one seed above, nested by line width, and the differences of all seeds below."""
    losses, smooth = points["losses"], points["smooth"]

    def running_mean(values: Any) -> tuple[Any, Any]:
        width = min(smooth, len(values))
        means = np.convolve(values, np.full(width, 1 / width), mode="valid")
        return np.arange(width, len(values) + 1), means

    figure.set_size_inches(9.5, 7)
    above, below = figure.subplots(2, 1, sharex=True)
    shown_seed = min(losses["full"])
    # Curves that coincide lie in each other, the widest below.
    upper = [m for m in losses if m != "full_reordered" and shown_seed in losses[m]]
    for order, (method, width) in enumerate(
        zip(upper, np.linspace(8, 1.2, len(upper)), strict=True)
    ):
        above.plot(*running_mean(losses[method][shown_seed]), linewidth=width,
                   color=RUN_COLORS.get(method, "#a05195"), zorder=order)  # fmt: skip
    handles = [below.plot([], [], color=RUN_COLORS["full"], linewidth=6)[0]]
    names = [seeds("full", len(losses["full"]))]
    for method in [m for m in losses if m != "full"]:
        found, color = list(paired(losses, method).values()), RUN_COLORS.get(method, "#a05195")
        for values in found:
            below.plot(*running_mean(values), color=color, linewidth=0.8, alpha=0.35)
        if found:
            handles += below.plot(*running_mean(np.mean(found, axis=0)), color=color, linewidth=2.4)
            names.append(seeds(method, len(found)))
    below.axhline(0, color="black", linewidth=0.8)
    above.set(
        ylabel=f"training loss, nats\n(seed {shown_seed}; lines lie in each other)",
        title=points["title"],
    )
    below.set(
        ylabel="minus full logits of the same seed, nats\n(thick: mean of the seeds, thin: each)",
        xlabel="step" if smooth == 1 else f"step (running mean of {smooth} steps)",
    )
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))


def rarity(runs: pd.DataFrame, name: str, title: str) -> Plot:
    """Held-out loss by how often training saw the token; see :func:`curves`."""
    columns = [column for column in runs if column.startswith("seen ")]
    names = [column.removeprefix("seen ") for column in columns]
    return Plot(
        name, draw_rarity, {"title": title, "names": names, "losses": by_seed(runs, columns)}
    )


def draw_rarity(figure: Any, points: dict[str, Any]) -> None:
    """Draw a dot for each seed and a bar for their mean, losses above and differences below."""
    figure.set_size_inches(9.5, 7)
    above, below = figure.subplots(2, 1, sharex=True)
    losses, groups = points["losses"], np.arange(len(points["names"]))
    for i, method in enumerate(losses):
        middle = groups + (i - (len(losses) - 1) / 2) * 0.2
        color, differences = RUN_COLORS.get(method, "#a05195"), paired(losses, method)
        own = {seed: np.array(losses[method][seed], float) for seed in differences}
        for ax, found in ((above, own), (below, differences))[: 1 if method == "full" else 2]:
            for j, values in enumerate(found.values()):
                place = middle + (j - (len(found) - 1) / 2) * 0.035
                ax.plot(place, values, "o", color=color, markersize=5, alpha=0.75)
            mean = np.mean(list(found.values()), axis=0)
            ax.hlines(mean, middle - 0.085, middle + 0.085, color=color, linewidth=2.2,
                      label=seeds(method, len(own)) if ax is above else None)  # fmt: skip
    below.axhline(0, color="black", linewidth=0.8)
    above.set(ylabel="held-out loss, nats", title=points["title"])
    below.set(ylabel="minus full logits of the\nsame seed, nats")
    below.set_xlabel("how often training saw the token (a dot for each seed, a bar for their mean)")
    below.set_xticks(groups, points["names"])
    figure.legend(loc="outside lower center", ncols=min(4, len(losses)))
