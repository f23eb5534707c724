"""PNG plots of measurements. Each carries a hash of what it shows, so that stale ones are found."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.methods import METHODS
from benchmark.results import Device, Row, in_order, of_results, roundings

HASH_KEY = "Measurements"
ORDER = list(METHODS)
LETTERS = {"tokens": "N", "classes": "V"}
COLORS = {
    "cce": "#c1272d", "cce_exact": "#e8833a", "chunked": "#b9a44c", "torch_compile": "#5b8c5a",
    "baseline": "#555555", "apple": "#3d6fb6", "liger": "#7d5ba6", "trl": "#4fa3a5",
    "torch": "#a0522d", "quack": "#d48bb5",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A picture that is not drawn yet.

    Args:
        name: of the file, without ``.png``.
        points: all that it shows, as JSON takes it.
        draw: makes a matplotlib figure of the points.
    """

    name: str
    points: Any
    draw: Callable[[Any], Any]

    def digest(self) -> str:
        """Changes when the points do."""
        return hashlib.sha256(json.dumps(self.points, sort_keys=True).encode()).hexdigest()[:24]

    def save(self, folder: Path) -> Path:
        """Draw it into a folder."""
        import matplotlib

        matplotlib.use("Agg")
        path = folder / f"{self.name}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure = self.draw(self.points)
        figure.savefig(path, dpi=110, metadata={"Software": None, HASH_KEY: self.digest()})
        matplotlib.pyplot.close(figure)
        return path


def digest_of(path: Path) -> str | None:
    """The hash that a PNG carries, or None."""
    data = path.read_bytes()
    place = 8
    while place + 8 <= len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        if kind == b"tEXt" and body.startswith(HASH_KEY.encode() + b"\0"):
            return body.split(b"\0", 1)[1].decode()
        place += size + 12
    return None


def figure(columns: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure with axes side by side."""
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(
        1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False
    )
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    return made, list(axes[0])


def plain_numbers(*axes: Any) -> None:
    """Write the numbers of logarithmic axes out."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for axis in axes:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        for which in (axis.set_major_formatter, axis.set_minor_formatter):
            which(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"))
        axis.set_tick_params(which="both", labelsize=8)


def label(method: str) -> str:
    """A method's name in a picture."""
    return METHODS[method].title.replace("`", "") or method if method in METHODS else method


def bars(rows: Sequence[Row], name: str, title: str) -> Plot | None:
    """Time and memory of all methods on one problem."""
    rows = [row for row in rows if row["kind"] == "loss-fw-bw"]
    if len({row["method"] for row in rows}) < 2:
        return None
    rows = sorted(rows, key=lambda row: row["runtime_ms"])
    points = {
        "title": title,
        "bars": [
            [row["method"], round(row["runtime_ms"], 2), round(row["op_mem_mb"], 1)] for row in rows
        ],
        "gemm": round(rows[0]["gemm_ms"], 2) if rows[0].get("gemm_ms") else None,
    }

    def draw(points: Any) -> Any:
        made, (left, right) = figure(2, 4.6, 0.42 * len(points["bars"]) + 1.3)
        names = [label(method) for method, _, _ in points["bars"]]
        colors = [COLORS.get(method, "gray") for method, _, _ in points["bars"]]
        for ax, column, form in ((left, 1, "{:.1f}"), (right, 2, "{:,.0f}")):
            values = [bar[column] for bar in points["bars"]]
            shown = ax.barh(names, values, color=colors)
            ax.bar_label(shown, labels=[form.format(v) for v in values], padding=3, fontsize=8)
            ax.invert_yaxis()
            ax.margins(x=0.16)
            ax.tick_params(axis="y", length=0)
        right.set_xscale("log")
        plain_numbers(right.xaxis)
        right.set_yticklabels([])
        left.set_xlabel("loss and both gradients, ms")
        right.set_xlabel("peak memory, gradients included, MiB")
        if points["gemm"]:
            left.axvline(3 * points["gemm"], color="black", linewidth=0.8, linestyle=":")
            left.set_title("dotted: three library products", fontsize=8, loc="right")
        made.suptitle(points["title"], fontsize=10)
        return made

    return Plot(name, points, draw)


def lines(rows: Sequence[Row], name: str, size: str, title: str) -> Plot | None:
    """Time per token (or per class) and memory against N (or V)."""
    unit = "token" if size == "tokens" else "class"
    series: dict[str, list[list[float]]] = {}
    for row in sorted(rows, key=lambda row: row[size]):
        series.setdefault(row["method"], []).append(
            [row[size], round(row["runtime_ms"] * 1e3 / row[size], 4), round(row["op_mem_mb"], 1)]
        )
    if not series or max(map(len, series.values())) < 3:
        return None
    points = {"title": title, "series": {m: series[m] for m in in_order(series, ORDER)}}

    def draw(points: Any) -> Any:
        made, (left, right) = figure(2, 4.6, 3.4)
        for method, values in points["series"].items():
            for ax, column in ((left, 1), (right, 2)):
                ax.plot(
                    [value[0] for value in values], [value[column] for value in values], "o-",
                    markersize=3, linewidth=1.4, color=COLORS.get(method), label=label(method),
                )  # fmt: skip
        for ax in (left, right):
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            plain_numbers(ax.yaxis)
            ax.set_xlabel("tokens a batch, N" if size == "tokens" else "classes, V")
        left.set_ylabel(f"loss and gradients, µs a {unit}")
        right.set_ylabel("peak memory, MiB")
        right.legend(fontsize=8, frameon=False)
        made.suptitle(points["title"], fontsize=10)
        return made

    return Plot(name, points, draw)


def speed_and_error(rows: Sequence[Row], name: str, title: str) -> Plot | None:
    """Time in products against the error of dE in roundings."""
    found = [
        [row["method"], round(row["gemms"], 3), round(error, 3)]
        for row in rows
        if row["kind"] == "loss-fw-bw" and row.get("gemms")
        and (error := roundings(row, "e")) is not None
    ]  # fmt: skip
    if len(found) < 2:
        return None

    def draw(points: Any) -> Any:
        made, (ax,) = figure(1, 5.6, 3.8)
        for method in in_order([point[0] for point in points["points"]], ORDER):
            own = [point for point in points["points"] if point[0] == method]
            ax.scatter(
                [point[1] for point in own], [point[2] for point in own], s=28,
                color=COLORS.get(method), label=label(method),
            )  # fmt: skip
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        ax.set_yscale("log")
        plain_numbers(ax.xaxis, ax.yaxis)
        ax.set_xlabel("loss and gradients, library products (left is faster)")
        ax.set_ylabel("error of dE, roundings to bfloat16")
        ax.legend(fontsize=8, frameon=False, ncols=2)
        ax.set_title(points["title"], fontsize=10)
        return made

    return Plot(name, {"title": title, "points": found}, draw)


def ranks(content: dict[str, Any], name: str = "ranks") -> Plot:
    """Probability by rank, with the cut-off."""
    curves = content["curves"]
    titles = {"smollm2": "SmolLM2-135M, real text"}
    points = {titles.get(key, key): value for key, value in curves.items()}

    def draw(points: Any) -> Any:
        made, (ax,) = figure(1, 6.0, 3.8)
        for (key, found), color in zip(
            points.items(), ("#c1272d", "#3d6fb6", "#5b8c5a"), strict=False
        ):
            ax.plot(found["ranks"], found["mean"], color=color, label=key)
            ax.fill_between(
                found["ranks"], found["low"], found["high"], alpha=0.15, color=color, linewidth=0
            )
        cutoff = next(iter(points.values()))["cutoff"]
        ax.axhline(cutoff, color="black", linewidth=0.9, linestyle="--")
        ax.text(1.1, cutoff * 0.6, "cut-off $2^{-12}$", fontsize=8, va="top")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(1e-10, 1)
        ax.set_xlabel("rank of the class (1 is the likeliest)")
        ax.set_ylabel("probability: mean, and four tokens of five")
        ax.legend(fontsize=8, frameon=False)
        return made

    return Plot(name, points, draw)


def plots_of(device: Device, prefix: str = "") -> list[Plot]:
    """Every plot that a device's measurements suffice for."""
    found: list[Plot | None] = []
    first = device.rows[0] if device.rows else {}
    plain = {"ignored": first.get("ignored"), "frozen": first.get("frozen")}
    for name in in_order([row["test_data"] for row in device.rows], []):
        rows = device.select(test_data=name, kind="loss-fw-bw", **plain)
        if rows and rows[0]["part"] in ("table", "benchmark"):
            title = f"{name}, N = {rows[0]['tokens']:,}, {device.name}"
            found.append(bars(rows, f"{prefix}bars_{name}", title))
    swept = device.select("sweeps", **plain) or device.select("benchmark", **plain)
    both = [row for row in swept if row["kind"] == "loss-fw-bw"]
    for size, other in (("tokens", "classes"), ("classes", "tokens")):
        usual = max([row[other] for row in both], key=[r[other] for r in both].count, default=0)
        rows = [row for row in both if row[other] == usual]
        # A suite's two sweeps have a point in common.
        rows = [r for r in rows if r["part"] != "sweeps" or r["test_data"][0] == LETTERS[size]]
        dims = {row["dim"] for row in rows}
        title = f"{other} {usual:,}, D {min(dims, default=0):,}, {device.name}"
        if len(dims) == 1:
            found.append(lines(rows, f"{prefix}sweep_{size}", size, title))
    title = f"every problem measured, {device.name}"
    found.append(speed_and_error(device.select(), f"{prefix}speed_error", title))
    return [plot for plot in found if plot is not None]


def plot_all(contents: Iterable[dict[str, Any]], folder: Path) -> list[Path]:
    """Plots of results that have just been measured."""
    return [plot.save(folder) for plot in plots_of(of_results(contents))]
