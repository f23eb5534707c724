"""Aims of the filter on real and broad heads, and what was measured."""

from dataclasses import dataclass
from typing import Any

from cut_cross_entropy.benchmark.environment import in_words
from docs.benchmark_runs import Measurements, data_title
from docs.page import table

PART = "aims"
FORWARD, ERROR, NORMS, PEAK = 1.12, 2.0, 0.8, 0.15


@dataclass(frozen=True)
class Aim:
    """Limits of one head.

    Args:
        time: of loss and both gradients, × matmul, at most.
        rows: cosines of rows of dC with the exact ones, percentiles 1, 10 and 50, at least.
    """

    time: float
    rows: tuple[float, float, float] = (0.88, 0.97, 0.995)


AIMS = {
    "gemma3-270m": Aim(1.6),
    "smollm2": Aim(2.8, (0.88, 0.96, 0.994)),
    "gemma2-broad": Aim(1.6),
    "llama3-8b-broad": Aim(1.7),
    "qwen3-0.6b-broad": Aim(1.7),
    "mistral-nemo-broad": Aim(1.7),
    "phi3.5-broad": Aim(2.7),
    "gemma2-structured": Aim(1.6),
    "gemma2-diffuse": Aim(1.6),
}


def missed(row: dict[str, Any], aim: Aim) -> list[str]:
    """Return in words which limits a row does not keep, and by how much."""
    at_most = (
        ("loss and gradients", row["time"], aim.time),
        ("forward", row["forward"], FORWARD),
        ("dE", row["error_e"], ERROR),
        ("dC", row["error_c"], ERROR),
        ("peak beyond the gradients", beyond(row), PEAK),
    )
    found = [f"{name} by {value - most:.2f}" for name, value, most in at_most if value > most]
    if any(value < least for value, least in zip(row["rows"], aim.rows, strict=True)):
        behind = (f"{max(0.0, least - value):.3f}"
                  for value, least in zip(row["rows"], aim.rows, strict=True))  # fmt: skip
        found.append(f"rows by {' / '.join(behind)}")
    if row["norms"] < NORMS:
        found.append(f"norms by {NORMS - row['norms']:.0%}")
    return found


def beyond(row: dict[str, Any]) -> float:
    """Return the peak memory beyond both gradients, relative to them."""
    tokens, classes, dim = row["tokens"], row["classes"], row["dim"]
    gradients = 2 * (tokens + classes) * dim / 2**20
    return float(row["peak_mib"]) / gradients - 1


def aims(kept: Measurements) -> str:
    """A line for each head, and which limits are missed by how much."""
    found = kept.parts(PART)
    if not found:
        return ""
    lines, misses = [], list[str]()
    for name, aim in AIMS.items():
        for row in (row for row in found[0]["rows"] if row["test_data"] == name):
            data = data_title(name)
            rows = " / ".join(f"{value:.3f}" for value in row["rows"])
            lines.append({**row, "data": data, "aim": aim.time, "rows": rows, "over": beyond(row)})
            if what := missed(row, aim):
                misses.append(f"- {data}: {'; '.join(what)}")
    text = table(
        lines,
        [("data", "{data}"), ("loss and gradients, × matmul", "{time:.2f}"), ("aim", "{aim:.1f}"),
         ("forward", "{forward:.2f}"), ("strips kept", "{strips_kept:.1%}"),
         ("error of dE / dC, × bf16 rounding", "{error_e:.2f} / {error_c:.2f}"),
         ("rows of dC", "{rows}"), ("norms within 10 %", "{norms:.0%}"),
         ("peak beyond the gradients", "{over:.0%}")],
    )  # fmt: skip
    kept_all = "Every aim is reached." if not misses else "Missed:\n\n" + "\n".join(misses)
    where = found[0]["environment"]
    return f"{text}\n{kept_all}\n\n{in_words(where)}, commit {where['commit']}."
