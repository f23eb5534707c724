"""Measurements as a table on the terminal, as CSV and as JSON."""

import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
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
    """A progress bar if tqdm is there, else lines; silent where stderr is no terminal."""

    def __init__(self, total: int, write: Callable[[str], object] | None = None) -> None:
        self.bar: Any = None
        self.write = write
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm

            self.bar = tqdm(total=total, leave=False, bar_format="{l_bar}{bar}| {n}/{total} {desc}")
        except ImportError:
            self.write = write or (lambda text: print(text, file=sys.stderr, flush=True))

    def say(self, text: str) -> None:
        """What is being done."""
        if self.bar is not None:
            self.bar.set_description_str(text)
        elif self.write is not None:
            self.write(text)

    def step(self) -> None:
        """One problem is done."""
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
