"""Measurements as a table on the terminal, as CSV and as JSON."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("method", "kind", "runtime_ms", "op_mem_mb", "test_data")
"""The columns that every table begins with."""

FORMATS = {
    **dict.fromkeys(COLUMNS, ""), "runtime_ms": ".2f", "op_mem_mb": ".1f", "gemms": ".2f",
    "tflops": ".3g", "error_dE": ".2%", "error_dC": ".2%",
    "error_logprobs": ".1e", "error_entropy": ".1e", "error_candidates": ".1e",
    "error_rank": ".2%", "error_divergence": ".1e",
}  # fmt: skip
MORE = (
    "gemms", "tflops", "error_e", "error_c", "rounding_e", "rounding_c", "loss_error",
    "error_logprobs", "error_entropy", "error_candidates", "error_rank", "error_divergence",
    "q1_ms", "q3_ms", "repetitions", "first_ms", "cold", "gemm_ms", "tokens", "classes", "dim",
    "dtype", "kind_of_data", "ignored", "frozen", "version",
)  # fmt: skip
WHERE = ("device", "torch", "triton", "cut_cross_entropy", "commit")


def sizes(row: dict[str, Any]) -> str:
    """Name the problem of a row and its sizes."""
    text = "{test_data}: N {tokens:,}, V {classes:,}, D {dim:,}, {dtype}"
    return text.format_map(row)


def memory_note(rows: Sequence[dict[str, Any]]) -> str:
    """Explain why ``chunked`` needs more memory than full logits, where it does."""
    peak = {row["method"]: row["op_mem_mb"] for row in rows}
    row = rows[0]
    if row["kind"] not in ("loss-bw", "loss-fw-bw") or peak.get("chunked", 0) <= peak.get(
        "baseline", float("inf")
    ):
        return ""
    return (
        "chunked needs more memory than full logits here: next to dC it has up to two float32 "
        "arrays of V x D\nwithin its budget of 256 MiB, whatever N is; full logits have several "
        f"of N x V. With N {row['tokens']:,} and D {row['dim']:,}\nthose are small; they grow with "
        "every token, its arrays do not."
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the terminal: the columns, the ratio to one product, speed and errors.

    Columns of errors that no row has are left out.
    """
    rows = [{**x, "error_dE": x.get("error_e"), "error_dC": x.get("error_c")} for x in rows]
    formats = {
        name: form
        for name, form in FORMATS.items()
        if not name.startswith("error_") or any(row.get(name) is not None for row in rows)
    }
    lines = [["", *formats]]
    for index, row in enumerate(rows):
        cells = ((row.get(name), form) for name, form in formats.items())
        lines.append([str(index), *("" if x is None else format(x, form) for x, form in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


WRITTEN = ("--json", "--csv", "--out")
"""Options that name a file or folder to write, of the benchmark and the experiments."""


def command_line(program: str, arguments: Sequence[str]) -> str:
    """Return a command as records keep it: without the files it writes, names in place of paths."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in WRITTEN:
            next(words, None)
        elif word.partition("=")[0] not in WRITTEN:
            option, equals, value = word.rpartition("=")
            kept.append(f"{option}{equals}{_name(value)}")
    return " ".join([program, *kept])


def _name(text: str) -> str:
    """Return the last part of a path; a model's name on a hub has a slash and is none."""
    path = Path(text)
    is_path = text.startswith((".", "~")) or path.is_absolute() or path.exists()
    return path.name if is_path and path.name else text


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write all at once: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def write_csv(path: Path, results: dict[str, Any]) -> None:
    """One line a row, where it was measured included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *MORE, *WHERE], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **results["environment"]} for row in results["rows"])
