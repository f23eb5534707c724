"""``python -m benchmark.report FILES``: Markdown tables of what the benchmark kept as JSON.

One section a file: where it was measured, then a line for every problem and method.
"""

import json
import sys
from pathlib import Path
from typing import Any

HEADER = (
    "| data | method | loss | gradients | both | both, ms | peak, MiB | error of dE | of dC |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|\n"
)


def line(name: str, method: str, rows: list[dict[str, Any]]) -> str:
    """One line: the kinds of pass side by side."""
    by_kind = {row["kind"]: row for row in rows}

    def gemms(kind: str) -> str:
        return f"{by_kind[kind]['gemms']:.2f}" if kind in by_kind else ""

    both = by_kind.get("loss-fw-bw", rows[0])
    errors = ["", ""]
    if "error_e" in both:
        errors = [f"{both[f'error_{x}']:.2%}" for x in ("e", "c")]
        if both["rounding_e"] > 0:  # float32 is its own rounding
            multiples = [both[f"error_{x}"] / both[f"rounding_{x}"] for x in ("e", "c")]
            errors = [f"{a} ({b:.1f}x)" for a, b in zip(errors, multiples, strict=True)]
    cells = [name, f"`{method}`", gemms("loss-fw"), gemms("loss-bw"), gemms("loss-fw-bw")]
    cells += [f"{both['runtime_ms']:.2f}", f"{both['op_mem_mb']:.0f}", *errors]
    return "| " + " | ".join(cells) + " |\n"


def section(results: dict[str, Any]) -> str:
    """The tables of one file."""
    where = results["environment"]
    text = f"## {where['device']}\n\n"
    text += (
        f"PyTorch {where['torch']}, Triton {where['triton']}, commit {where['commit']}. Times in "
        "library products of the same shape (GEMMs) measured in the same run; errors with "
        "multiples of what rounding the exact gradient costs.\n\n"
    )
    text += HEADER
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["test_data"], row["method"]), []).append(row)
    for (name, method), rows in groups.items():
        text += line(name, method, rows)
    text += "\nOne GEMM, milliseconds: "
    times = {name: rows[0]["gemm_ms"] for (name, _), rows in groups.items()}
    text += ", ".join(f"{name} {time:.2f}" for name, time in times.items()) + ".\n\n"
    text += "| data | filter: strips kept | dropped mass | flat tokens | path |\n"
    text += "|---|---:|---:|---:|---|\n"
    for (name, method), rows in groups.items():
        for record in rows[0].get("filter", []):
            if method == "cce":
                text += (
                    f"| {name} | {record['strips_kept']:.2%} | {record['dropped_mass']:.2%} | "
                    f"{record['flat_tokens']} of {record['tokens']} | {record['path']} |\n"
                )
    return text


def main() -> None:
    """Print the sections of the files named on the command line."""
    for name in sys.argv[1:]:
        print(section(json.loads(Path(name).read_text())))


if __name__ == "__main__":
    main()
