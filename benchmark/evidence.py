"""Markdown tables of sweeps, options, cold starts, largest batches and parts of the filter."""

import re
import statistics
from typing import Any

from benchmark.cells import ORDER, data_title, markdown, number, title
from benchmark.results import Device, in_order


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
            line.append("" if row is None else f"{row['runtime_ms'] * 1e3 / n:.3g}")
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
                line.append(f"{row['tokens']:,} or more")
            else:
                line.append(f"{row['tokens']:,}")
        lines.append(line)
    return markdown(("method", *(f"within {limit:g} GiB" for limit in limits)), lines)


def parts(content: dict[str, Any], device: Device) -> str:
    """What each part of the filter buys, simulated, with the times of what exists."""
    exists = {"no filter": "cce_exact", "strips and tail, classes by mask": "cce",
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


def failures(device: Device) -> str:
    """What could not be measured, and why; a method that ran out of time is named once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for file, content in device.files.items():
        for failure in content.get("failures", []):
            reason = failure["error"].split(". ")[0]
            if re.fullmatch(r"no answer within (-\d+|0) s", reason):
                reason = "no time was left"
            what = "" if reason == "no time was left" else f" ({failure.get('what', '')})"
            key = (file, data_title(failure.get("test_data", "")), reason)
            found.setdefault(key, []).append(title(failure["method"]) + what)
    return "".join(
        f"- {file}: {data}{': ' if data else ''}{', '.join(dict.fromkeys(methods))}: {reason}\n"
        for (file, data, reason), methods in found.items()
    )


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
