"""Measurements as a table on the terminal, as CSV and as JSON."""

import contextlib
import csv
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("method", "kind", "runtime_ms", "op_mem_mb", "test_data")
"""The columns that every table begins with."""

MORE = (
    "gemms", "tflops", "error_e", "error_c", "rounding_e", "rounding_c", "loss_error", "spread_ms",
    "q1_ms", "q3_ms", "repetitions", "first_ms", "cold", "gemm_ms", "tokens", "classes", "dim",
    "dtype", "kind_of_data", "ignored", "frozen", "version",
)  # fmt: skip
WHERE = ("device", "torch", "triton", "cut_cross_entropy", "commit")


def sizes(row: dict[str, Any]) -> str:
    """Name the problem of a row and its sizes."""
    return (
        f"{row['test_data']}: N {row['tokens']:,}, V {row['classes']:,}, D {row['dim']:,}, "
        f"{row['dtype']}"
    )


def memory_note(rows: Sequence[dict[str, Any]]) -> str:
    """Explain why ``chunked`` needs more memory than full logits, where it does."""
    peak = {row["method"]: row["op_mem_mb"] for row in rows}
    row = rows[0]
    if row["kind"] == "loss-fw" or peak.get("chunked", 0) <= peak.get("baseline", float("inf")):
        return ""
    return (
        "chunked needs more memory than full logits here: next to dC it has up to two float32 "
        "arrays of V x D\nwithin its budget of 256 MiB, whatever N is; full logits have several "
        f"of N x V. With N {row['tokens']:,} and D {row['dim']:,}\nthose are small; they grow with "
        "every token, its arrays do not."
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the terminal: the columns, the ratio to one product, speed and errors."""
    names = [*COLUMNS, "gemms", "tflops", "error_dE", "error_dC"]
    lines = [["", *names]]
    for index, row in enumerate(rows):
        cells = [str(index), row["method"], row["kind"]]
        cells += [f"{row['runtime_ms']:.2f}", f"{row['op_mem_mb']:.1f}", row["test_data"]]
        cells += [_number(row.get("gemms"), ".2f"), _number(row.get("tflops"), ".3g")]
        cells += [_number(row.get(f"error_{x}"), ".2%") for x in "ec"]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write all at once: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def write_csv(path: Path, results: dict[str, Any]) -> None:
    """One line a row, where it was measured included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {name: results["environment"].get(name) for name in WHERE}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *MORE, *WHERE], extrasaction="ignore")
        writer.writeheader()
        for row in results["rows"]:
            writer.writerow({**row, **where})


class Progress:
    """A progress bar on a terminal, if tqdm is installed; else a line on stderr for every step."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        self.start = time.perf_counter()
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                form = "{l_bar}{bar}| {n}/{total} {desc}"
                self.bar = tqdm(total=total, leave=False, bar_format=form)

    def say(self, text: str) -> None:
        """Tell what is being done."""
        if self.bar is not None:
            self.bar.set_description_str(text)
        else:
            elapsed = time.perf_counter() - self.start
            print(f"[{elapsed:5.0f} s] {text}", file=sys.stderr, flush=True)

    def step(self) -> None:
        """Count a problem as done."""
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
