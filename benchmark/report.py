"""Markdown tables of measurements. ``python -m benchmark.report FILES`` prints those of files."""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmark.methods import METHODS
from benchmark.results import (
    Device,
    Row,
    gradients_mib,
    in_order,
    of_results,
    roundings,
)
from benchmark.shapes import SHAPES

ORDER = list(METHODS)
GIB = 1024.0


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    text = "| " + " | ".join(header) + " |\n"
    text += "|:---|" + "---:|" * (len(header) - 1) + "\n"
    return text + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def title(method: str) -> str:
    """What a table calls a method."""
    return METHODS[method].title if method in METHODS else f"`{method}`"


def data_title(name: str) -> str:
    """What a table calls a problem."""
    model, _, kind = name.rpartition("-")
    if model in SHAPES:
        return f"{SHAPES[model].title}, {kind}"
    return {"smollm2": "SmolLM2, real text", "smol": "SmolLM2, real text"}.get(name, name)


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A figure, or nothing."""
    return "" if value is None else format(value, form) + unit


def error(row: Row, name: str) -> str:
    """An error in percent, and in roundings of the exact gradient."""
    value = row.get(f"error_{name}")
    if value is None:
        return ""
    multiple = roundings(row, name)
    return f"{value:.2%}" + (f" ({multiple:.1f})" if multiple is not None else "")


def where(device: Device) -> str:
    """One sentence for each environment."""
    lines = []
    for found in device.environments:
        text = f"{found['device']}, PyTorch {found['torch']}, Triton {found['triton']}"
        if "python" in found:
            text += f", Python {found['python']}"
        lines.append(text + f", commit {found['commit']}")
    return "; ".join(lines) + "."


def like_the_seed(rows: Sequence[Row]) -> str:
    """Every method and kind of one problem: the columns of the command's own table."""
    kinds = ("loss-fw", "loss-bw", "loss-fw-bw")
    rows = sorted(rows, key=lambda row: (kinds.index(row["kind"]), row["runtime_ms"]))
    return markdown(
        ("method", "kind", "runtime_ms", "op_mem_mb", "GEMMs", "TFLOP/s", "error of dE", "of dC"),
        (
            (
                title(row["method"]),
                row["kind"],
                number(row["runtime_ms"], ",.1f"),
                number(row["op_mem_mb"], ",.0f"),
                number(row.get("gemms")),
                number(row.get("tflops"), ".0f"),
                error(row, "e"),
                error(row, "c"),
            )
            for row in rows
        ),
    )


def by_problem(device: Device, names: Sequence[str], methods: Sequence[str]) -> str:
    """One line a problem and method, kinds side by side."""
    lines = []
    for name in names:
        rows = device.select(test_data=name)
        for method in in_order([row["method"] for row in rows], ORDER):
            if method not in methods:
                continue
            kinds = {row["kind"]: row for row in rows if row["method"] == method}
            both = kinds.get("loss-fw-bw")
            if both is None:
                continue
            lines.append(
                (
                    data_title(name),
                    title(method),
                    *(
                        number(kinds[kind].get("gemms")) if kind in kinds else ""
                        for kind in ("loss-fw", "loss-bw", "loss-fw-bw")
                    ),
                    number(both["runtime_ms"]),
                    number(both["op_mem_mb"], ",.0f"),
                    error(both, "e"),
                    error(both, "c"),
                )
            )
    header = ("data", "method", "loss", "gradients", "both", "both, ms", "peak, MiB", "error of dE",
              "of dC")  # fmt: skip
    return markdown(header, lines)


def headline(device: Device) -> str:
    """Our default on the models' shapes."""
    lines = []
    for row in device.select(method="cce", kind="loss-fw-bw", ignored=0.0, frozen=None):
        model, _, kind = row["test_data"].rpartition("-")
        if model not in SHAPES or kind != "structured" or row["part"] not in ("table", "shapes"):
            continue
        shape = SHAPES[model]
        above = row["op_mem_mb"] - gradients_mib(row)
        errors = [number(roundings(row, name), ".1f") for name in "ec"]
        lines.append(
            (
                f"{shape.title} (V {shape.num_classes:,}, D {shape.dim:,}"
                + (", softcap)" if shape.softcap else ")"),
                f"{row['runtime_ms']:.1f} ms",
                number(row.get("gemms")),
                f"{above:.0f} MiB ({above / gradients_mib(row):.0%})",
                " / ".join(errors),
            )
        )
    lines.sort(key=lambda line: [shape.title for shape in SHAPES.values()].index(
        line[0].split(" (V")[0]))  # fmt: skip
    header = ("classifier", "loss and gradients", "GEMMs", "peak beyond the gradients",
              "error of dE / dC, in roundings")  # fmt: skip
    return markdown(header, lines)


def against_others(device: Device) -> str:
    """Our default beside the best of all that is not this package, problem by problem."""
    lines = []
    shown = [row for row in device.rows if row["part"] in ("table", "tails", "benchmark")]
    names = in_order([row["test_data"] for row in shown], [])
    for name in names:
        rows = {row["method"]: row for row in device.select(test_data=name, kind="loss-fw-bw")}
        ours = rows.get("cce")
        others = [r for m, r in rows.items() if METHODS[m].peer or m == "baseline" or m == "torch"]
        if ours is None or not others:
            continue
        cells = [data_title(name)]
        measures: list[tuple[str, Callable[[Row], float | None]]] = [
            (",.1f", lambda row: row["runtime_ms"]),
            (",.0f", lambda row: row["op_mem_mb"]),
            (".2f", lambda row: roundings(row, "e")),
            (".2f", lambda row: roundings(row, "c")),
        ]
        for form, value in measures:
            own = value(ours)
            known = [(v, row["method"]) for row in others if (v := value(row)) is not None]
            if own is None or not known:
                cells.append("")
                continue
            best, method = min(known)
            verdict = "**won**" if own < best else "lost" if own > best else "even"
            cells.append(f"{verdict}: {own:{form}}, {title(method)} {best:{form}}")
        lines.append(cells)
    header = ("data", "time, ms", "peak, MiB", "error of dE, roundings", "error of dC, roundings")
    return markdown(header, lines) if lines else ""


def cold_starts(device: Device) -> str:
    """First calls from empty caches."""
    found: dict[str, float] = {}
    for row in device.rows:
        if row.get("cold") and row["part"] in ("table", "benchmark"):
            found.setdefault(row["method"], row["first_ms"] / 1e3)
    lines = [(title(m), f"{found[m]:.1f} s") for m in in_order(found, ORDER)]
    return markdown(("method", "first call"), lines) if lines else ""


def options(device: Device) -> str:
    """Ignored targets and frozen inputs beside the plain call."""
    rows = [row for row in device.select("options") if row["kind"] == "loss-fw-bw"]
    names = in_order([row["test_data"] for row in rows], [])
    methods = in_order([row["method"] for row in rows], ORDER)
    if not rows:
        return ""
    cells = {(row["test_data"], row["method"]): row for row in rows}
    lines = []
    for name in names:
        what, _, value = name.rpartition("-")
        text = f"{float(value):.0%} of the targets ignored" if what == "ignored" else (
            f"`{value}` needs no gradient")  # fmt: skip
        found = [cells.get((name, method)) for method in methods]
        lines.append(
            (
                text,
                *(
                    number(None if row is None else row["runtime_ms"], ".1f", " ms")
                    for row in found
                ),
            )
        )
    return markdown(("", *map(title, methods)), lines)


def sweep(device: Device, size: str) -> str:
    """Time per token or per class."""
    letter = "N" if size == "tokens" else "V"
    rows = [row for row in device.select("sweeps") if row["test_data"].startswith(letter)]
    if not rows:
        return ""
    methods = in_order([row["method"] for row in rows], ORDER)
    cells = {(row[size], row["method"]): row for row in rows}
    unit = "token" if size == "tokens" else "class"
    lines = []
    for n in sorted({row[size] for row in rows}):
        line = [f"{n:,}"]
        for method in methods:
            row = cells.get((n, method))
            line.append("" if row is None else f"{row['runtime_ms'] * 1e3 / n:.2f}")
        lines.append(line)
    return markdown((f"{letter}, µs a {unit}", *map(title, methods)), lines)


def largest(content: dict[str, Any]) -> str:
    """Largest batches."""
    limits = sorted({row["limit_gib"] for row in content["rows"]})
    methods = in_order([row["method"] for row in content["rows"]], ORDER)
    cells = {(row["method"], row["limit_gib"]): row for row in content["rows"]}
    lines = []
    for method in methods:
        line = [title(method)]
        for limit in limits:
            row = cells.get((method, limit))
            if row is None:
                line.append("")
            elif row["tokens"] >= content["most"]:
                line.append(f"{row['tokens']:,} ran; about {row['forecast']:,}")
            else:
                line.append(f"{row['tokens']:,}")
        lines.append(line)
    return markdown(("method", *(f"within {limit:g} GiB" for limit in limits)), lines)


def parts(content: dict[str, Any], device: Device) -> str:
    """What each part of the filter buys, simulated, with the times of what exists."""
    exists = {"no filter": "cce_exact", "strips and tail, classes by membership": "cce",
              "tiles, classes by mean logit": "apple"}  # fmt: skip
    lines = []
    for row in content["rows"]:
        method = exists.get(row["part"])
        timed = device.select(test_data=row["test_data"], method=method, kind="loss-fw-bw")
        time = f"{timed[0]['runtime_ms']:.1f} ms ({title(method or '')})" if timed else ""
        lines.append(
            (
                data_title(row["test_data"]),
                row["part"],
                f"{row['kept']:.1%}",
                f"{row['error_e']:.3%} ({row['error_e'] / row['rounding_e']:.1f})",
                f"{row['error_c']:.3%} ({row['error_c'] / row['rounding_c']:.1f})",
                number(row.get("pairs"), ".1f"),
                time,
            )
        )
    header = ("data", "part", "kept", "error of dE", "of dC", "pairs in dC", "time measured")
    return markdown(header, lines)


def filter_table(device: Device) -> str:
    """What the filter kept and dropped."""
    lines = []
    for row in device.select(method="cce", kind="loss-fw-bw", ignored=0.0, frozen=None):
        for record in row.get("filter", [])[:1]:
            lines.append(
                (
                    data_title(row["test_data"]),
                    f"{record['strips_kept']:.2%}",
                    f"{record['dropped_mass']:.2%}",
                    f"{record['flat_tokens']} of {record['tokens']}",
                    record["path"],
                )
            )
    header = ("data", "strips kept", "dropped mass", "flat tokens", "path")
    return markdown(header, lines) if lines else ""


def failures(device: Device) -> str:
    """What could not be measured, and why."""
    lines = [
        f"- {file}: {found.get('test_data', '')} {title(found['method'])} "
        f"{found.get('what', '')}: {found['error']}"
        for file, content in device.files.items()
        for found in content.get("failures", [])
    ]
    return "\n".join(lines) + "\n" if lines else ""


def spread(device: Device) -> str:
    """How far repetitions lie apart, in one sentence."""
    shares = [
        (row["q3_ms"] - row["q1_ms"]) / row["runtime_ms"]
        for row in device.rows
        if row.get("repetitions", 0) > 3
    ]
    if not shares:
        return ""
    return (
        f"Between the quartiles of the repetitions of a row lie {statistics.median(shares):.1%} of "
        f"its median (median row), {sorted(shares)[int(0.9 * len(shares))]:.1%} for one row in ten."
    )


def main() -> None:
    """Print the tables of the files named on the command line."""
    device = of_results(json.loads(Path(name).read_text()) for name in sys.argv[1:])
    print(where(device) + "\n")
    names = in_order([row["test_data"] for row in device.rows], [])
    print(by_problem(device, names, ORDER))
    print(filter_table(device))
    print(failures(device))


if __name__ == "__main__":
    main()
