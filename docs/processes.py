"""Tables of docs/distributed.md from what ``benchmark.distributed`` measured."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from cut_cross_entropy.benchmark.environment import in_words
from cut_cross_entropy.benchmark.setups import LOGITS, OWN_TOKENS
from cut_cross_entropy.benchmark.shapes import SHAPES
from docs.page import number, table

WANTED = (2, 4, 8)
"""Counts of GPUs that the page is about."""

TELLING = 0.1
"""Collectives that take a smaller part of a step are lost in what a step varies by."""

COLUMNS = ["data", "tokens", "setup", "impl", "processes", "ms", "alone_ms", "exchange_ms",
           "sent_mib", "peak_mib", "why"]  # fmt: skip
KEY = ["data", "tokens", "alone", "impl"]


def rows_of(record: dict[str, Any]) -> pd.DataFrame:
    """Return the rows of a file, by size and head, with what the tables show of them."""
    rows = pd.DataFrame(record["rows"])
    rows = rows.reindex(columns=rows.columns.union(COLUMNS, sort=False)).astype(object)
    heads = list(dict.fromkeys(rows["data"]))
    rows = rows.sort_values(["tokens", "data"], kind="stable", key=lambda column: (
        column.map(heads.index) if column.name == "data" else column))  # fmt: skip
    logits = rows["setup"].isin(LOGITS)
    rows["alone"] = logits.map({True: "one GPU, full logits", False: "one GPU"})
    rows["head"] = [SHAPES[x].title if x in SHAPES else x for x in rows["data"]]
    rows["name"] = rows["setup"].where(logits, rows["setup"] + ", `" + rows["impl"] + "`")
    return rows


def with_efficiency(rows: pd.DataFrame, one: pd.DataFrame | None) -> pd.DataFrame:
    """Add ``efficiency`` and ``hidden``, both fractions.

    Efficiency is the time of one GPU for its share of the work over the time of the step. With
    tokens of its own on each GPU the share is what one GPU does for as many tokens; where the GPUs
    have the same tokens, it is that divided by the GPUs.

    Args:
        rows: of several processes.
        one: rows of one process on the same kind of GPU.
    """
    if one is None:
        alone = pd.Series(float("nan"), index=rows.index)
    else:
        times = one[one["setup"] == one["alone"]].set_index(KEY)["ms"].astype(float)
        alone = pd.Series(times.reindex(pd.MultiIndex.from_frame(rows[KEY])).values, rows.index)
    share = alone / rows["processes"].where(~rows["setup"].isin(OWN_TOKENS), 1)
    exchange, step = rows["exchange_ms"].astype(float), rows["ms"].astype(float)
    shown = (exchange > 0) & (exchange >= TELLING * step)
    hidden = 1 - (step - rows["alone_ms"].astype(float)) / exchange.where(shown)
    return rows.assign(efficiency=share / step, hidden=hidden)


def page(records: Sequence[dict[str, Any]]) -> str:
    """Return a section for each device and count of GPUs, and which counts are missing."""
    if not records:
        return ""
    single = {r["environment"]["device"]: rows_of(r) for r in records if r["processes"] == 1}
    order = sorted(records, key=lambda r: (r["processes"] == 1, r["environment"]["device"],
                                           r["processes"]))  # fmt: skip
    sections = [_section(record, single.get(record["environment"]["device"])) for record in order]
    measured = {record["processes"] for record in records}
    missing = [str(n) for n in WANTED if n not in measured]
    if missing:
        sections.append(f"Not measured yet: {' and '.join(missing)} GPUs.\n")
    return "\n".join(sections)


def _section(record: dict[str, Any], one: pd.DataFrame | None) -> str:
    count, found = record["processes"], record["environment"]
    several = f"{count} x " if count > 1 else ""
    title = f"{count} GPUs" if count > 1 else "One GPU, for comparison"
    text = (f"### {title}: {found['device']}\n\n{several}{in_words(found)}, "
            f"commit {found['commit']}.")  # fmt: skip
    if record["links"]:
        speeds = (f"{kind.replace('_', '-')} {x:,.0f}" for kind, x in record["links"].items())
        text += f" Collectives of 256 MiB, GB/s on the bus: {', '.join(speeds)}."
    rows = rows_of(record)
    text += "\n\n" + (_several(with_efficiency(rows, one)) if count > 1 else _one(rows))
    for row in rows[rows["ms"].notna() & rows["why"].notna()].to_dict("records"):
        text += (
            f"\n{row['head']}, {row['tokens']:,} tokens, {row['name']}: incomplete, {row['why']}\n"
        )
    if record["skipped"]:
        skipped = rows_of({"rows": record["skipped"]}).sort_index()
        names = (f"{row['head']}, {row['tokens']:,} tokens, {row['name']}"
                 for row in skipped.to_dict("records"))  # fmt: skip
        text += f"\nNo time was left for: {'; '.join(names)}.\n"
    return text


def _several(rows: pd.DataFrame) -> str:
    columns = {
        "ms": ("step, ms", ".1f"), "efficiency": ("efficiency", ".0%"),
        "alone_ms": ("without communication, ms", ".1f"),
        "exchange_ms": ("collectives alone, ms", ".2f"), "hidden": ("hidden", ".0%"),
        "sent_mib": ("sent, MiB", ",.0f"), "peak_mib": ("peak, MiB", ",.0f"),
    }  # fmt: skip
    lines = []
    for row in rows.to_dict("records"):
        cells = [number(row[name], form) for name, (_, form) in columns.items()]
        if pd.isna(row["ms"]):
            cells = [row["why"], *[""] * (len(columns) - 1)]
        lines.append([row["head"], f"{row['tokens']:,}", row["name"], *cells])
    return table(("head", "tokens of a GPU", "set-up", *(x for x, _ in columns.values())), lines)


def _one(rows: pd.DataFrame) -> str:
    return table(
        ("head", "tokens", "", "loss and gradients, ms", "peak, MiB"),
        [
            [row["head"], f"{row['tokens']:,}", row["name"], number(row["ms"], ".1f") or row["why"],
             number(row["peak_mib"], ",.0f")]
            for row in rows.to_dict("records")
        ],
    )  # fmt: skip
