"""Markdown tables, and the blocks between the markers of a page."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

NOTHING = "Not measured yet."


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Format a table whose first column is text and whose others are numbers; "" if it is empty."""
    rows = [f"| {' | '.join(line)} |\n" for line in lines]
    if not rows:
        return ""
    return f"| {' | '.join(header)} |\n|:---|{'---:|' * (len(header) - 1)}\n{''.join(rows)}"


def number(value: Any, form: str = ".2f") -> str:
    """Format a number; "" if it is missing."""
    return "" if value is None or pd.isna(value) else format(value, form)


def fill(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Return a page with its blocks made anew.

    Raises:
        ValueError: a marker without its other half, or a block that nobody makes.
    """
    begins = re.findall(r"<!-- begin ([\w-]+) -->", text)
    ends = re.findall(r"<!-- end ([\w-]+) -->", text)
    if begins != ends:
        raise ValueError(f"markers must come in pairs, got begin {begins} and end {ends}")
    unknown = set(begins) - set(blocks)
    if unknown:
        raise ValueError(f"blocks must be of {', '.join(blocks)}, got {', '.join(unknown)}")
    for name in begins:
        made = blocks[name]().strip("\n") or NOTHING
        before, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        text = f"{before}{begin}\n{made}\n\n{end}{after}"
    return text
