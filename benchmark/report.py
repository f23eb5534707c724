"""Markdown tables of measurements. ``python -m benchmark.report FILES`` prints those of files."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.cells import ORDER, data_title, error, markdown, number, title, where
from benchmark.evidence import failures
from benchmark.methods import METHODS
from benchmark.results import (
    Device,
    Row,
    gradients_mib,
    in_order,
    of_results,
    roundings,
)
from benchmark.shapes import SHAPES


def all_kinds(rows: Sequence[Row]) -> str:
    """Every method and kind of one problem: the columns of the command's own table."""
    kinds = ("loss-fw", "loss-bw", "loss-fw-bw")
    rows = sorted(rows, key=lambda row: (kinds.index(row["kind"]), row["runtime_ms"]))
    return markdown(
        ("method", "kind", "runtime_ms", "op_mem_mb", "GEMMs", "TFLOP/s", "error of dE", "of dC"),
        (
            (
                title(row["method"]),
                row["kind"],
                number(row["runtime_ms"], ",.1f"),
                number(row["op_mem_mb"], ",.0f"),
                number(row.get("gemms")),
                number(row.get("tflops"), ".0f"),
                error(row, "e"),
                error(row, "c"),
            )
            for row in rows
        ),
    )


def by_problem(device: Device, names: Sequence[str], methods: Sequence[str]) -> str:
    """One line a problem and method, kinds side by side."""
    lines = []
    for name in names:
        rows = device.select(test_data=name)
        for method in in_order([row["method"] for row in rows], ORDER):
            if method not in methods:
                continue
            kinds = device.of_problem(name, method)
            both = kinds.get("loss-fw-bw")
            if both is None:
                continue
            lines.append(
                (
                    data_title(name),
                    title(method),
                    *(
                        number(kinds[kind].get("gemms")) if kind in kinds else ""
                        for kind in ("loss-fw", "loss-bw", "loss-fw-bw")
                    ),
                    number(both["runtime_ms"]),
                    number(both["op_mem_mb"], ",.0f"),
                    error(both, "e"),
                    error(both, "c"),
                )
            )
    header = ("data", "method", "loss", "gradients", "both", "both, ms", "peak, MiB", "error of dE",
              "of dC")  # fmt: skip
    return markdown(header, lines) if lines else ""


def headline(device: Device) -> str:
    """Our default on the models' shapes."""
    lines = []
    for name in in_order([row["test_data"] for row in device.select(method="cce")], []):
        row = device.of_problem(name, "cce").get("loss-fw-bw")
        model, _, kind = name.rpartition("-")
        if (
            row is None
            or model not in SHAPES
            or kind != "structured"
            or row["part"] not in ("table", "shapes")
        ):
            continue
        shape = SHAPES[model]
        above = row["op_mem_mb"] - gradients_mib(row)
        errors = [number(roundings(row, name), ".1f") for name in "ec"]
        lines.append(
            (
                f"{shape.title} (V {shape.num_classes:,}, D {shape.dim:,}"
                + (", softcap)" if shape.softcap else ")"),
                f"{row['runtime_ms']:.1f} ms",
                number(row.get("gemms")),
                f"{above:.0f} MiB ({above / gradients_mib(row):.0%})",
                " / ".join(errors),
            )
        )
    lines.sort(key=lambda line: [shape.title for shape in SHAPES.values()].index(
        line[0].split(" (V")[0]))  # fmt: skip
    header = ("classifier", "loss and gradients", "GEMMs", "peak beyond the gradients",
              "error of dE / dC, in roundings")  # fmt: skip
    return markdown(header, lines)


COMPARED = {
    "cce": "**this package**, `cce`",
    "cce_exact": "**this package**, `cce_exact`",
    "torch_compile": "full logits, `torch.compile`",
    "baseline": "full logits, eager",
    "trl": "TRL {version}",
    "apple": "Apple's `cut_cross_entropy` {version}",
    "liger": "Liger {version}",
}
"""Lines of the README's table."""


def comparison(device: Device, problems: Sequence[str] = ("gemma2-structured", "smollm2")) -> str:
    """Time, peak and error of every method, the problems next to each other."""
    rows = {
        name: {row["method"]: row for row in device.select(test_data=name, kind="loss-fw-bw")}
        for name in problems
    }
    shown = [name for name in problems if rows[name]]
    header = ["loss and both gradients"]
    for name in shown:
        model = data_title(name).split(",")[0]
        header += [f"{model}, ms", "peak, MiB", "error of dE / dC"]
    lines = []
    for method, text in COMPARED.items():
        found = [rows[name].get(method) for name in shown]
        known = [row for row in found if row is not None]
        if not known:
            continue
        line = [text.format(version=known[0].get("version", "")).strip()]
        for row in found:
            errors = [number(roundings(row, name), ".1f") for name in "ec"] if row else ["", ""]
            line += [
                number(row["runtime_ms"] if row else None, ",.1f"),
                number(row["op_mem_mb"] if row else None, ",.0f"),
                " / ".join(errors) if all(errors) else "",
            ]
        lines.append(line)
    return markdown(header, lines) if lines else ""


FULL_LOGITS = ("baseline", "torch_compile", "torch")
"""PyTorch's own ways, beside other packages; our name of the second stands for compiled code."""


def against_others(device: Device) -> str:
    """Our default beside the best of all that is not this package, problem by problem."""
    lines = []
    shown = [row for row in device.rows if row["part"] in ("table", "tails", "benchmark")]
    names = in_order([row["test_data"] for row in shown], [])
    for name in names:
        rows = {row["method"]: row for row in device.select(test_data=name, kind="loss-fw-bw")}
        ours = rows.get("cce")
        others = [r for m, r in rows.items() if METHODS[m].peer or m in FULL_LOGITS]
        if ours is None or {row["method"] for row in others} <= {"baseline"}:
            continue  # eager full logits are slower than whatever else was not measured there
        cells = [data_title(name)]
        measures: list[tuple[str, Callable[[Row], float | None]]] = [
            (",.1f", lambda row: row["runtime_ms"]),
            (",.0f", lambda row: row["op_mem_mb"]),
            (".2f", lambda row: roundings(row, "e")),
            (".2f", lambda row: roundings(row, "c")),
        ]
        for form, value in measures:
            own = value(ours)
            known = [(v, row["method"]) for row in others if (v := value(row)) is not None]
            if own is None or not known:
                cells.append("")
                continue
            best, method = min(known)
            verdict = "**won**" if own < best else "lost" if own > best else "even"
            cells.append(f"{verdict}: {own:{form}}, {title(method)} {best:{form}}")
        lines.append(cells)
    header = ("data", "time, ms", "peak, MiB", "error of dE, roundings", "error of dC, roundings")
    return markdown(header, lines) if lines else ""


def filter_table(device: Device) -> str:
    """What the filter kept and dropped."""
    lines = []
    for row in device.select(method="cce", kind="loss-fw-bw", ignored=0.0, frozen=None):
        for record in row.get("filter", [])[:1]:
            lines.append(
                (
                    data_title(row["test_data"]),
                    f"{record['strips_kept']:.2%}",
                    f"{record['dropped_mass']:.2%}",
                    f"{record['flat_tokens']} of {record['tokens']}",
                    record["path"],
                )
            )
    header = ("data", "strips kept", "dropped mass", "flat tokens", "path")
    return markdown(header, lines) if lines else ""


def main() -> None:
    """Print the tables of the files named on the command line."""
    device = of_results(json.loads(Path(name).read_text()) for name in sys.argv[1:])
    print(where(device) + "\n")
    names = in_order([row["test_data"] for row in device.rows], [])
    print(by_problem(device, names, ORDER))
    print(filter_table(device))
    print(failures(device))


if __name__ == "__main__":
    main()
