"""Tables of docs/distributed.md from what ``benchmark.distributed`` measured."""

from collections.abc import Iterable
from typing import Any

from benchmark.cells import machine, markdown, number
from benchmark.results import Device, Row
from benchmark.setups import LOGITS, OWN_TOKENS
from benchmark.shapes import SHAPES

PART = "distributed"
WANTED = (2, 4, 8)
"""Counts of GPUs that the page is about."""

Record = dict[str, Any]


def records(devices: Iterable[Device]) -> list[tuple[Device, Record]]:
    """Every file of measurements with several processes, or of one beside them."""
    found = [(device, record) for device in devices for record in device.all_of(PART)]
    return sorted(found, key=lambda pair: (pair[0].name, pair[1]["processes"]))


def page(devices: Iterable[Device]) -> str:
    """A section for each device and count of GPUs, and which counts are missing."""
    found = records(devices)
    if not found:
        return ""
    sections = [_section(device, record) for device, record in found if record["processes"] > 1]
    sections += [_section(device, record) for device, record in found if record["processes"] == 1]
    missing = [str(n) for n in WANTED if n not in {record["processes"] for _, record in found}]
    if missing:
        sections.append(f"Not measured yet: {' and '.join(missing)} GPUs.\n")
    return "\n".join(sections)


def where(record: Record) -> str:
    """The GPUs, versions and commit of a file, in a sentence."""
    found, count = record["environment"], record["processes"]
    several = f"{count} x " if count > 1 else ""
    return f"{several}{machine(found)}, commit {found['commit']}."


def efficiency(row: Row, alone: Record | None) -> float | None:
    """Time of one GPU for its share of the work, beside the time of a step; 1 is all one can have.

    With tokens of its own on each GPU the share is what one GPU does for as many tokens; where the
    GPUs have the same tokens, it is that divided by the GPUs.
    """
    setup = "one GPU, full logits" if row["setup"] in LOGITS else "one GPU"
    wanted = (row["data"], row["tokens"], setup, row["impl"])
    for one in (alone or {}).get("rows", []):
        found = (one["data"], one["tokens"], one["setup"], one["impl"])
        if found == wanted and one["ms"] is not None:
            share = one["ms"] / (1 if row["setup"] in OWN_TOKENS else row["processes"])
            return float(share / row["ms"])
    return None


TELLING = 0.1
"""Collectives that take a smaller part of a step are lost in what a step varies by."""


def hidden(row: Row) -> float | None:
    """Share of the time of the collectives that does not show in the step; None if too short."""
    if row.get("alone_ms") is None or not row.get("exchange_ms"):
        return None
    if row["exchange_ms"] < TELLING * row["ms"]:
        return None
    return float(1 - (row["ms"] - row["alone_ms"]) / row["exchange_ms"])


def _section(device: Device, record: Record) -> str:
    count = record["processes"]
    title = f"{count} GPUs" if count > 1 else "One GPU, for comparison"
    text = f"### {title}: {device.name}\n\n{where(record)}"
    if record["links"]:
        speeds = (
            f"{kind.replace('_', '-')} {speed:,.0f}" for kind, speed in record["links"].items()
        )
        text += f" Collectives of 256 MiB, GB/s on the bus: {', '.join(speeds)}."
    text += "\n\n" + (_shared(device, record) if count > 1 else _alone(record))
    text += "".join(
        f"\n{_head(row)}, {row['tokens']:,} tokens, {_name(row)}: incomplete, {row['why']}\n"
        for row in record["rows"]
        if row["ms"] is not None and "why" in row
    )
    if record["skipped"]:
        names = (
            f"{_head(row)}, {row['tokens']:,} tokens, {_name(row)}" for row in record["skipped"]
        )
        text += f"\nNo time was left for: {'; '.join(names)}.\n"
    return text


def _shared(device: Device, record: Record) -> str:
    alone = next((one for one in device.all_of(PART) if one["processes"] == 1), None)
    header = (
        "head", "tokens of a GPU", "set-up", "step, ms", "efficiency", "without communication, ms",
        "collectives alone, ms", "hidden", "sent, MiB", "peak, MiB",
    )  # fmt: skip
    lines = []
    for row in _sorted(record["rows"]):
        names = (_head(row), f"{row['tokens']:,}", _name(row))
        if row["ms"] is None:
            lines.append((*names, row["why"], *[""] * (len(header) - 4)))
            continue
        lines.append(
            (
                *names,
                number(row["ms"], ".1f"),
                number(efficiency(row, alone), ".0%"),
                number(row["alone_ms"], ".1f"),
                number(row["exchange_ms"], ".2f"),
                number(hidden(row), ".0%"),
                number(row["sent_mib"], ",.0f"),
                number(row["peak_mib"], ",.0f"),
            )
        )
    return markdown(header, lines)


def _alone(record: Record) -> str:
    header = ("head", "tokens", "", "loss and gradients, ms", "peak, MiB")
    return markdown(
        header,
        (
            (
                _head(row),
                f"{row['tokens']:,}",
                _name(row),
                row["why"] if row["ms"] is None else number(row["ms"], ".1f"),
                number(row["peak_mib"], ",.0f"),
            )
            for row in _sorted(record["rows"])
        ),
    )


def _sorted(rows: list[Row]) -> list[Row]:
    """By size and head; what was measured last is not what is read last."""
    heads = list(dict.fromkeys(row["data"] for row in rows))
    return sorted(rows, key=lambda row: (row["tokens"], heads.index(row["data"])))


def _head(row: Row) -> str:
    return SHAPES[row["data"]].title if row["data"] in SHAPES else str(row["data"])


def _name(row: Row) -> str:
    return str(row["setup"]) if row["setup"] in LOGITS else f"{row['setup']}, `{row['impl']}`"
