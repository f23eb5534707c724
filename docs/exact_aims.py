"""Aims of the exact sums beside other methods, and of plain PyTorch, and what was measured."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from docs.benchmark_runs import BOTH, ONE_SIDED, Measurements, data_title, title, where_from
from docs.page import Column, Row, cell, table

LARGE, ONE_EXACT, ERROR, MEMORY = 3.4, 2.5, 1.4, 1 / 3
OTHERS = ("torch_compile", "quack", "trl")
FLAT = ("flat", "randn")  # data that nothing is to be skipped of
TIMES = ("cce", "cce_exact", "cce_exact_1gib", *ONE_SIDED)
SLACK = 0.03  # runs of the same code in turns differ by as much


def small_budget(classes: int) -> float:
    """Return the aim at the default budget, × matmul."""
    return 3.8 if classes <= 160_000 else 4.0


def _of(kept: Measurements, *parts: str) -> pd.DataFrame:
    """Return the rows of loss and gradients of some parts, of the device of the first."""
    found = kept.parts(parts[0])
    if not found:
        return kept.rows[:0]
    device = found[0]["environment"]["device"]
    return pd.concat([kept.of(device, kind=BOTH, part=part) for part in parts])


def missed(data: str, by_method: dict[str, dict[str, Any]]) -> list[str]:
    """Return in words which limits the rows of a problem do not keep."""
    exact = by_method["cce_exact"]
    default = small_budget(int(exact["classes"]))
    limits = [("cce_exact", default), ("cce_exact_1gib", LARGE),
              *((name, ONE_EXACT) for name in ONE_SIDED)]  # fmt: skip
    found = [f"{title(name)} {by_method[name]['gemms']:.2f} (at most {limit})"
             for name, limit in limits
             if name in by_method and by_method[name]["gemms"] > limit]  # fmt: skip
    for name in (name for name, _ in limits if name in by_method):
        for side in "ec":
            value = by_method[name][f"multiple_{side}"]
            # The gradient that is filtered has the filter's aim.
            if value > ERROR and name in ("cce_exact", "cce_exact_1gib", f"cce_exact_{side}"):
                found.append(f"{title(name)}, error of d{side.upper()} {value:.1f}")
    best = min(by_method[name]["runtime_ms"] for name in TIMES[1:3] if name in by_method)
    for name in (name for name in OTHERS if name in by_method):
        other = by_method[name]
        if other["runtime_ms"] < best:
            found.append(f"{title(name)} is faster ({other['gemms']:.2f})")
        if exact["op_mem_mb"] > other["op_mem_mb"] * MEMORY:
            share = exact["op_mem_mb"] / other["op_mem_mb"]
            found.append(f"{share:.0%} of the memory of {title(name)}")
    if data.rpartition("-")[2] in FLAT and "cce" in by_method:
        slower = by_method["cce"]["gemms"] / exact["gemms"] - 1
        found += [f"default {slower:.0%} slower than `cce_exact`"] * (slower > SLACK)
    return found


def exact(kept: Measurements) -> str:
    """A line for each problem, and which limits are missed."""
    rows = _of(kept, "comparison", "tails")
    if "cce_exact_1gib" not in set(rows["method"]):
        return ""
    rows = rows[rows["method"].isin((*TIMES, *OTHERS))]
    lines, misses, shown = [], list[str](), list[pd.DataFrame]()
    for data, own in rows.groupby("test_data", sort=False):
        by_method = own.set_index("method").to_dict("index")
        if not {"cce_exact", "cce_exact_1gib"} <= set(by_method):
            continue
        small = small_budget(int(by_method["cce_exact"]["classes"]))
        shown.append(own)
        lines.append({"data": data_title(str(data)), "small": small, **by_method})
        if what := missed(str(data), by_method):
            misses.append(f"- {data_title(str(data))}: {'; '.join(what)}")

    def at(name: str, form: str) -> Callable[[Row], str]:
        return lambda row: cell(row.get(name, {}), form)

    errors = "{multiple_e:.1f} / {multiple_c:.1f}"
    columns: list[Column] = [
        ("× matmul", "{data}"),
        ("aim, 256 MiB", "{small:.1f}"),
        *((title(name), at(name, "{gemms:.2f}")) for name in (*TIMES, *OTHERS)),
        ("error of dE / dC, `cce_exact`", at("cce_exact", errors)),
        ("at 1 GiB", at("cce_exact_1gib", errors)),
        ("peak at 256 MiB", at("cce_exact", "{op_mem_mb:,.0f} MiB")),
    ]
    text = "Every aim is reached." if not misses else "Missed:\n\n" + "\n".join(misses)
    return f"{table(lines, columns)}\n{text}\n\n{where_from(kept, pd.concat(shown))}"


def plain(kept: Measurements) -> str:
    """`chunked` in units of eager full logits."""
    rows = _of(kept, "chunked")
    lines = []
    for (data, dtype), own in rows.groupby(["test_data", "dtype"], sort=False):
        by_method = own.set_index("method").to_dict("index")
        if "baseline" not in by_method:
            continue
        eager = by_method["baseline"]["runtime_ms"]
        ratios = {name: {**row, "ratio": row["runtime_ms"] / eager}
                  for name, row in by_method.items()}  # fmt: skip
        name = data_title(str(data).removesuffix(f"-{dtype}"))
        lines.append({"data": name, "dtype": dtype, **ratios})
    if not lines:
        return ""
    part = lambda name, form: lambda row: cell(row.get(name, {}), form)
    text = table(
        lines,
        [("data", "{data}"), ("dtype", "{dtype}"),
         ("full logits, eager, ms", part("baseline", "{runtime_ms:,.1f}")),
         ("`chunked`, 256 MiB, of eager", part("chunked", "{ratio:.2f}")),
         ("1 GiB", part("chunked_1gib", "{ratio:.2f}")),
         ("peak, MiB, eager", part("baseline", "{op_mem_mb:,.0f}")),
         ("256 MiB", part("chunked", "{op_mem_mb:,.0f}"))],
    )  # fmt: skip
    return f"{text}\n{where_from(kept, rows)}"


BLOCKS = {"exact": exact, "plain": plain}
