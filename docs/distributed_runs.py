"""Tables of docs/distributed.md from what ``benchmark.distributed`` measured."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pandas as pd

from cut_cross_entropy.benchmark.distributed import FIGURES, Job
from cut_cross_entropy.benchmark.environment import in_words
from cut_cross_entropy.benchmark.setups import LOGITS, OWN_TOKENS
from cut_cross_entropy.benchmark.shapes import SHAPES
from docs.page import Column, Row, cell, table

WANTED = (2, 4, 8)
"""Counts of GPUs that the page is about."""

TELLING = 0.1
"""Collectives that take a smaller part of a step are lost in what a step varies by."""

COLUMNS = [*(field.name for field in fields(Job)), "processes", *FIGURES, "why"]
KEY = ["data", "tokens", "alone", "impl"]


def rows_of(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return rows of a file by size and head, with what the tables show of them."""
    found = pd.DataFrame(rows, columns=COLUMNS).astype(object)
    heads = list(dict.fromkeys(found["data"]))
    found = found.sort_values(["tokens", "data"], kind="stable", key=lambda column: (
        column.map(heads.index) if column.name == "data" else column))  # fmt: skip
    logits = found["setup"].isin(LOGITS)
    found["alone"] = logits.map({True: "one GPU, full logits", False: "one GPU"})
    found["head"] = [SHAPES[x].title if x in SHAPES else x for x in found["data"]]
    found["name"] = found["setup"].where(logits, found["setup"] + ", `" + found["impl"] + "`")
    return found


def with_efficiency(rows: pd.DataFrame, one: pd.DataFrame | None) -> pd.DataFrame:
    """Add ``efficiency`` and ``hidden``, both fractions.

    Efficiency is the time of one GPU for its share of the work over the time of the step. With
    tokens of its own on each GPU the share is what one GPU does for as many tokens; where the GPUs
    have the same tokens, it is that divided by the GPUs.

    Args:
        rows: of several processes.
        one: rows of one process on the same kind of GPU.
    """
    one = rows[:0] if one is None else one[one["setup"] == one["alone"]]
    alone = rows[KEY].merge(one[[*KEY, "ms"]], "left", KEY)["ms"].astype(float).to_numpy()
    share = alone / rows["processes"].where(~rows["setup"].isin(OWN_TOKENS), 1)
    exchange, step = rows["exchange_ms"].astype(float), rows["ms"].astype(float)
    shown = (exchange > 0) & (exchange >= TELLING * step)
    hidden = 1 - (step - rows["alone_ms"].astype(float)) / exchange.where(shown)
    return rows.assign(efficiency=share / step, hidden=hidden)


def page(records: Sequence[dict[str, Any]]) -> str:
    """Return a section for each device and count of GPUs, and which counts are missing."""
    if not records:
        return ""
    device = lambda record: record["environment"]["device"]
    single = {device(r): rows_of(r["rows"]) for r in records if r["processes"] == 1}
    order = sorted(records, key=lambda r: (r["processes"] == 1, device(r), r["processes"]))
    sections = [_section(record, single.get(device(record))) for record in order]
    measured = {record["processes"] for record in records}
    missing = [str(n) for n in WANTED if n not in measured]
    if missing:
        sections.append(f"Not measured yet: {' and '.join(missing)} GPUs.\n")
    return "\n".join(sections)


def _section(record: dict[str, Any], one: pd.DataFrame | None) -> str:
    count, found = record["processes"], record["environment"]
    title = f"{count} GPUs" if count > 1 else "One GPU, for comparison"
    text = (f"### {title}: {found['device']}\n\n{f'{count} x ' if count > 1 else ''}"
            f"{in_words(found)}, commit {found['commit']}.")  # fmt: skip
    if record["links"]:
        speeds = (f"{kind.replace('_', '-')} {x:,.0f}" for kind, x in record["links"].items())
        text += f" Collectives of 256 MiB, GB/s on the bus: {', '.join(speeds)}."
    rows, what = rows_of(record["rows"]), "{head}, {tokens:,} tokens, {name}"
    text += "\n\n" + table(with_efficiency(rows, one), SEVERAL if count > 1 else ONE)
    for row in rows[rows["ms"].notna() & rows["why"].notna()].to_dict("records"):
        text += f"\n{cell(row, what)}: incomplete, {row['why']}\n"
    if record["skipped"]:
        skipped = rows_of(record["skipped"]).sort_index().to_dict("records")
        text += f"\nNo time was left for: {'; '.join(cell(row, what) for row in skipped)}.\n"
    return text


def _time(row: Row) -> str:
    return cell(row, "{ms:.1f}") or row["why"]


SEVERAL: list[Column] = [
    ("head", "{head}"),
    ("tokens of a GPU", "{tokens:,}"),
    ("set-up", "{name}"),
    ("step, ms", _time),
    ("efficiency", "{efficiency:.0%}"),
    ("without communication, ms", "{alone_ms:.1f}"),
    ("collectives alone, ms", "{exchange_ms:.2f}"),
    ("hidden", "{hidden:.0%}"),
    ("sent, MiB", "{sent_mib:,.0f}"),
    ("peak, MiB", "{peak_mib:,.0f}"),
]
ONE: list[Column] = [
    ("head", "{head}"),
    ("tokens", "{tokens:,}"),
    ("", "{name}"),
    ("loss and gradients, ms", _time),
    ("peak, MiB", "{peak_mib:,.0f}"),
]
