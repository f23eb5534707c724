"""Plots of the documentation; each PNG carries a digest of its data and of the code behind it."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
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
    "font.size": 11, "figure.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 110,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A plot that has not been drawn yet.

    Args:
        name: file name without ``.png``.
        title: stands above it.
        draw: draws ``data`` into an empty matplotlib figure.
        data: everything that the plot shows.
    """

    name: str
    title: str
    draw: Callable[[Any, pd.DataFrame], None]
    data: pd.DataFrame

    @property
    def digest(self) -> str:
        """Hash of the data, the drawing function's source, the colours and the methods' names."""
        names = [method_name(m) for m in METHODS if m in set(self.data.get("method", ()))]
        shared = [COLORS, RUN_COLORS, RUN_NAMES, STYLE, names]
        code = [inspect.getsource(function) for function in (self.draw, log_axis, Plot.figure)]
        content = json.dumps([self.title, self.data.to_dict("list"), shared, code])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def is_current(self, folder: Path) -> bool:
        """Whether ``folder`` holds this plot, drawn from the same data by the same code."""
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
            figure.suptitle(self.title)
            self.draw(figure, self.data)
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


def bars(rows: pd.DataFrame, name: str) -> Plot | None:
    """Time and memory of all methods on one problem."""
    if rows["method"].nunique() < 2:
        return None
    first = rows.iloc[0]
    title = (f"{head(first['test_data'])}, {first['tokens']:,} tokens, {first['dtype']}, "
             f"{short(first['device'])}")  # fmt: skip
    columns = ["method", "runtime_ms", "op_mem_mb", "gemm_ms"]
    return Plot(name, title, draw_bars, rows.sort_values("runtime_ms")[columns])


def draw_bars(figure: Any, data: pd.DataFrame) -> None:
    """Draw horizontal bars that start at 0, time on the left and memory on the right."""
    names = data["method"].map(method_name)
    figure.set_size_inches(11, 0.46 * len(names) + 1.6)
    axes = figure.subplots(1, 2, sharey=True)
    colors = [COLORS.get(method, "gray") for method in data["method"]]
    sides = (("runtime_ms", ",.1f", "time of loss and both gradients, ms"),
             ("op_mem_mb", ",.0f", "peak memory, gradients included, MiB"))  # fmt: skip
    for ax, (column, form, label) in zip(axes, sides, strict=True):
        shown = ax.barh(names, data[column], color=colors)
        texts = ax.bar_label(shown, [format(x, form) for x in data[column]], padding=3)
        for text in texts:  # a line behind a number must not cross it
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        ax.set(xlim=(0, data[column].max() * 1.18), xlabel=label)
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.tick_params(axis="y", length=0)
    axes[0].invert_yaxis()
    least = 3 * data["gemm_ms"].iloc[0]
    if not pd.isna(least):
        label = f"three matrix products e @ c.T\nby the vendor's library: {least:.1f} ms"
        axes[0].axvline(least, color="black", linewidth=1, linestyle=":", zorder=0.5, label=label)
        axes[0].legend(loc="upper right")


def sweep(rows: pd.DataFrame, name: str, size: str) -> Plot | None:
    """Time and memory against the number of tokens or classes."""
    if rows["dim"].nunique() != 1 or rows["method"].value_counts().max() < 3:
        return None
    first = rows.iloc[0]
    alike = [f"{shape.title} head, " for shape in SHAPES.values() if shape.dim == first["dim"]
             and (size == "classes" or shape.num_classes == first["classes"])]  # fmt: skip
    fixed = f"{first['classes']:,} classes" if size == "tokens" else f"{first['tokens']:,} tokens"
    title = (f"{''.join(alike[:1])}{fixed}, {first['dim']:,} features, {first['dtype']}, "
             f"{short(first['device'])}")  # fmt: skip
    columns = ["method", size, "runtime_ms", "op_mem_mb"]
    return Plot(name, title, draw_sweep, rows.sort_values(["method", size])[columns])


def draw_sweep(figure: Any, data: pd.DataFrame) -> None:
    """Draw two panels with logarithmic axes, microseconds a token or class and memory."""
    figure.set_size_inches(11, 4.4)
    axes, size = figure.subplots(1, 2), data.columns[1]
    unit, what = ("token", "tokens in a batch") if size == "tokens" else ("class", "classes")
    for method, own in data.groupby("method", observed=True):
        n, ms, mib = own[size], own["runtime_ms"], own["op_mem_mb"]
        for ax, y in zip(axes, (1e3 * ms / n, mib), strict=True):
            # Wide and pale below narrow and dark, since several methods need the same memory.
            ax.plot(n, y, "o-", color=COLORS.get(method), label=method_name(method), alpha=0.85,
                    markersize=4, linewidth=4 if method == "baseline" else 1.8)  # fmt: skip
    ticks = sorted(data[size].unique())
    labels = (f"loss and gradients, µs per {unit}", "peak memory, MiB")
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xscale("log", base=2)
        log_axis(ax.yaxis, (1.5, 2, 3, 4, 5, 7))
        ax.set_xticks(ticks, [f"{x / 1024:g}k" for x in ticks])
        ax.set(xlabel=f"{what} (log scale)", ylabel=f"{label} (log scale)")
    axes[1].legend(fontsize=10)


def speed_error(rows: pd.DataFrame, name: str) -> Plot | None:
    """Time in matrix products against the error of dE, every problem measured."""
    rows = rows[rows["gemms"].notna() & rows["multiple_e"].notna()]
    if len(rows) < 2:
        return None
    first = rows.iloc[0]
    title = (f"Each dot one problem: {rows['test_data'].nunique()} heads and kinds of data, "
             f"{first['dtype']}, {short(first['device'])}")  # fmt: skip
    return Plot(name, title, draw_speed_error, rows[["method", "gemms", "multiple_e"]])


def draw_speed_error(figure: Any, data: pd.DataFrame) -> None:
    """Draw a scatter plot with logarithmic axes."""
    figure.set_size_inches(9, 5.6)
    ax = figure.subplots()
    for method, own in data.groupby("method", observed=True):
        ax.scatter(own["gemms"], own["multiple_e"], s=46, color=COLORS.get(method), alpha=0.8,
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
    )
    figure.legend(loc="outside right center", fontsize=10)


def runs_in_order(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the training runs of each method by seed, methods with a colour first."""
    order = [*RUN_COLORS, *runs["method"]]
    methods = sorted(runs["method"].unique(), key=order.index)
    return {m: runs[runs["method"] == m].set_index("seed").sort_index() for m in methods}


def minus(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Return the difference of two methods for each seed that both have."""
    seeds = one.index.intersection(other.index)
    return one.loc[seeds] - other.loc[seeds]


def seeds(method: str, count: int) -> str:
    """Name a method of training runs and count its seeds."""
    return f"{run_name(method)}, {count} seed{'s' * (count > 1)}"


def draw_curves(figure: Any, runs: pd.DataFrame) -> None:
    """Draw losses of training runs: one seed above, the methods nested by line width, and the
    differences from full logits of all seeds below; ``smooth`` steps of a running mean.
    """
    spread = {"full_fsdp2": "#d9822b", "cce_fsdp2": "#5a8fc0", "cce_vocab_parallel": "#e377c2"}
    colors = {**COLORS, **RUN_COLORS, **spread}
    smooth, by_method = int(runs["smooth"].iloc[0]), runs_in_order(runs)
    losses = {m: pd.DataFrame(own["losses"].tolist(), own.index) for m, own in by_method.items()}

    def running_mean(values: Any) -> tuple[Any, Any]:
        width = min(smooth, len(values))
        means = np.convolve(values, np.full(width, 1 / width), mode="valid")
        return np.arange(width, len(values) + 1), means

    figure.set_size_inches(9.5, 7)
    above, below = figure.subplots(2, 1, sharex=True)
    full = losses.pop("full")
    seed, others = full.index[0], losses.items()
    shown = {"full": full} | {m: x for m, x in others if m != "full_reordered" and seed in x.index}
    # Curves that coincide lie in each other, the widest below.
    for order, (method, own) in enumerate(shown.items()):
        above.plot(*running_mean(own.loc[seed]), linewidth=np.linspace(8, 1.2, len(shown))[order],
                   color=colors.get(method, "#a05195"), zorder=order)  # fmt: skip
    handles = below.plot([], [], color=RUN_COLORS["full"], linewidth=6)
    names = [seeds("full", len(full))]
    for method, own in losses.items():
        found, color = minus(own, full), colors.get(method, "#a05195")
        for values in found.to_numpy():
            below.plot(*running_mean(values), color=color, linewidth=0.8, alpha=0.35)
        if len(found):
            handles += below.plot(*running_mean(found.mean()), color=color, linewidth=2.4)
            names.append(seeds(method, len(found)))
    below.axhline(0, color="black", linewidth=0.8)
    above.set_ylabel(f"training loss, nats\n(seed {seed}; lines lie in each other)")
    below.set(
        ylabel="minus full logits of the same seed, nats\n(thick: mean of the seeds, thin: each)",
        xlabel="step" if smooth == 1 else f"step (running mean of {smooth} steps)",
    )
    columns = 3 if max(map(len, names)) > 26 and len(names) > 4 else 4
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(names)))


def draw_rarity(figure: Any, runs: pd.DataFrame) -> None:
    """Draw held-out losses by how often training saw the token: a dot for each seed and a bar for
    their mean, losses above and differences from full logits below.
    """
    figure.set_size_inches(9.5, 7)
    above, below = figure.subplots(2, 1, sharex=True)
    columns = [column for column in runs if column.startswith("seen ")]
    by_method = {m: own[columns].astype(float) for m, own in runs_in_order(runs).items()}
    groups = np.arange(len(columns))
    for i, (method, own) in enumerate(by_method.items()):
        middle = groups + (i - (len(by_method) - 1) / 2) * 0.2
        color = RUN_COLORS.get(method, "#a05195")
        differences = minus(own, by_method["full"])
        own = own.loc[differences.index]
        for ax, found in ((above, own), (below, differences))[: 1 if method == "full" else 2]:
            for j, values in enumerate(found.to_numpy()):
                place = middle + (j - (len(found) - 1) / 2) * 0.035
                ax.plot(place, values, "o", color=color, markersize=5, alpha=0.75)
            ax.hlines(found.mean(), middle - 0.085, middle + 0.085, color=color, linewidth=2.2,
                      label=seeds(method, len(own)) if ax is above else None)  # fmt: skip
    below.axhline(0, color="black", linewidth=0.8)
    above.set_ylabel("held-out loss, nats")
    below.set_ylabel("minus full logits of the\nsame seed, nats")
    below.set_xlabel("how often training saw the token (a dot for each seed, a bar for their mean)")
    below.set_xticks(groups, [column.removeprefix("seen ") for column in columns])
    figure.legend(loc="outside lower center", ncols=min(4, len(by_method)))
