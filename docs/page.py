"""Markdown tables, and the blocks between the markers of a page."""

import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import pandas as pd

NOTHING = "Not measured yet: there is no record."

Row: TypeAlias = Mapping[str, Any]
Column: TypeAlias = tuple[str, str | Callable[[Row], str]]
"""Heading, and what makes a cell of a row: a format string or a function."""


def table(rows: "pd.DataFrame | Iterable[Row]", columns: Iterable[Column]) -> str:
    """Format a table whose first column is text and whose others are numbers; "" if it is empty."""
    columns = list(columns)
    if isinstance(rows, pd.DataFrame):
        rows = rows.to_dict("records")
    lines = [f"| {' | '.join(cell(row, make) for _, make in columns)} |\n" for row in rows]
    if not lines:
        return ""
    heading = f"| {' | '.join(name for name, _ in columns)} |\n"
    return f"{heading}|:---|{'---:|' * (len(columns) - 1)}\n{''.join(lines)}"


def cell(row: Row, make: str | Callable[[Row], str]) -> str:
    """Format a cell, by a format string such as ``"{ms:.1f} ms"``: "" if one of its values is
    missing.
    """
    if callable(make):
        return make(row)
    names = [name for _, name, _, _ in string.Formatter().parse(make) if name]
    return "" if any(pd.isna(row.get(name)) for name in names) else make.format_map(row)


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

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{blocks[found[2]]().strip() or NOTHING}\n\n{found[3]}"

    return re.sub(r"(?s)(<!-- begin ([\w-]+) -->).*?(<!-- end \2 -->)", made, text)


def without_paths(command: str) -> str:
    """Leave out of a command line where its record went, and which commit and how long it ran."""
    return re.sub(r" --(json|csv|out|commit|time-limit) \S+", "", command)
