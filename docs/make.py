"""Make the tables and plots of the documentation from the measurements that are kept.

    python docs/make.py            # all of them
    python docs/make.py --check    # write nothing; fail if one is stale
    python docs/make.py out/*.json --plots out    # of files that were just measured

Reads every JSON file under ``docs/measurements``, writes the blocks between the markers
``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of the pages, and the PNGs in ``docs/images``.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # started by its path: Python then puts this folder first, not the root
    sys.path[0] = str(ROOT)

from cut_cross_entropy.benchmark.environment import in_words  # noqa: E402
from cut_cross_entropy.benchmark.methods import METHODS  # noqa: E402
from cut_cross_entropy.benchmark.shapes import SHAPES  # noqa: E402
from docs import plots, processes, training_runs  # noqa: E402
from docs.page import fill, number, table  # noqa: E402

PAGES = tuple(
    Path(page)
    for page in ("README.md", "docs/benchmarks.md", "docs/numerics.md", "docs/distributed.md",
                 "docs/training.md", "docs/experiments.md")
)  # fmt: skip
BOTH = "loss-fw-bw"
KINDS = ("loss-fw", "loss-bw", BOTH)


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured.

    Args:
        files: content of every JSON file by its path, later measurements last.
        rows: all rows of the benchmark, with ``device``, ``source`` (the path) and ``part``;
            ``multiple_e`` and ``multiple_c`` are errors as multiples of bfloat16 rounding.
        devices: names, the one with the most rows first.
    """

    files: dict[str, dict[str, Any]]
    rows: pd.DataFrame
    devices: list[str]

    def of(self, device: str | None = None, **equal: Any) -> pd.DataFrame:
        """Return the newest row of every problem, method and kind, of one device.

        Args:
            device: its name; the first one by default.
            **equal: values of columns.
        """
        found = self.rows[self.rows["device"] == (device or self.devices[0])]
        for column, value in equal.items():
            found = found[found[column].isna() if value is None else found[column] == value]
        return found.drop_duplicates(["test_data", "method", "kind"], keep="last")

    def one_run(self, device: str, test_data: str, method: str) -> dict[str, Any]:
        """Return rows by kind from one run: the run with the most kinds, the latest of several."""
        found = self.rows.query(
            "device == @device and test_data == @test_data and method == @method"
        )
        if found.empty:
            return {}
        kinds = found.groupby("source", sort=False)["kind"].nunique()
        best = found[found["source"] == kinds[kinds == kinds.max()].index[-1]]
        return {row["kind"]: row for row in best.to_dict("records")}

    def part(self, name: str) -> dict[str, Any] | None:
        """Return the file of a part that has a form of its own, the main device's first."""
        found = self.parts(name)
        return found[0] if found else None

    def parts(self, name: str) -> list[dict[str, Any]]:
        """Return all files of a part, the main device's first."""
        found = [content for content in self.files.values() if content.get("part") == name]
        return sorted(
            found, key=lambda content: self.devices.index(content["environment"]["device"])
        )

    def problems(self, *parts: str, device: str | None = None) -> list[str]:
        """Return the problems of some parts in the order of their measurement."""
        found = self.rows[self.rows["device"] == (device or self.devices[0])]
        return list(dict.fromkeys(found[found["part"].isin(parts)]["test_data"]))


def collect(files: dict[str, dict[str, Any]]) -> Measurements:
    """Put the rows of all files into one table.

    Raises:
        ValueError: a file does not name its device.
    """
    rows: list[dict[str, Any]] = []
    count: dict[str, int] = {}
    for source, content in files.items():
        try:
            device = content["environment"]["device"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source} must name environment.device") from error
        found = [row for row in content.get("rows", []) if "kind" in row]
        count[device] = count.get(device, 0) + len(found)
        where = {"device": device, "source": source, "part": content.get("part", "benchmark")}
        rows += [{**row, **where} for row in found]
    columns = ["device", "source", "part", "test_data", "method", "kind", "dtype", "tokens", "dim",
               "classes", "runtime_ms", "op_mem_mb", "gemms", "gemm_ms", "gemm_even", "tflops",
               "q1_ms", "q3_ms", "repetitions", "cold", "first_ms", "ignored", "frozen", "filter",
               "version", "error_e", "error_c", "rounding_e", "rounding_c"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns)
    for name in "ec":
        rounding = frame[f"rounding_{name}"].astype(float)
        multiple = frame[f"error_{name}"].astype(float) / rounding.where(rounding > 0)
        frame[f"multiple_{name}"] = multiple
    # Files without gemm_even compare an odd V with a product of as many classes, which is far
    # slower than one of a few less.
    odd = frame["classes"].astype(float).mod(8).gt(0) & frame["gemm_even"].isna()
    frame.loc[odd, ["gemms", "gemm_ms"]] = None
    return Measurements(files, frame, sorted(count, key=lambda device: -count[device]))


def read(folder: Path) -> Measurements:
    """Read the benchmark's files below ``folder``; a device's own folder is newer than a file."""
    paths = sorted(folder.rglob("*.json"), key=lambda path: (len(path.parts), path))
    return collect(
        {
            path.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8"))
            for path in paths
            if "experiments" not in path.parts
        }
    )


def in_order(methods: Iterable[str]) -> list[str]:
    """Return the different methods in the order of the benchmark, unknown ones last."""
    known = list(METHODS)
    return sorted(
        dict.fromkeys(methods), key=lambda m: known.index(m) if m in known else len(known)
    )


def title(method: str) -> str:
    """Name a method in a table."""
    return METHODS[method].title if method in METHODS else f"`{method}`"


def data_title(name: str) -> str:
    """Name a problem in a table."""
    model, _, kind = name.rpartition("-")
    if model in SHAPES:
        return f"{SHAPES[model].title}, {kind}"
    return {"smollm2": "SmolLM2, real text", "smol": "SmolLM2, real text"}.get(name, name)


def error(row: dict[str, Any], name: str) -> str:
    """Write an error in percent and as a multiple of rounding the exact gradient."""
    if pd.isna(row[f"error_{name}"]):
        return ""
    multiple = number(row[f"multiple_{name}"], ".1f")
    return f"{row[f'error_{name}']:.2%}" + (f" ({multiple})" if multiple else "")


def where(kept: Measurements, device: str | None = None) -> str:
    """Name the device, the versions and the commits of the benchmark's rows."""
    commits: dict[str, list[str]] = {}
    for content in kept.files.values():
        found = content["environment"]
        apart = content.get("part") in ("distributed", "training-processes")
        if found["device"] == (device or kept.devices[0]) and not apart:
            commits.setdefault(in_words(found), []).append(found["commit"])
    texts = []
    for text, names in commits.items():
        names = list(dict.fromkeys(names))
        texts.append(f"{text}, commit{'s' * (len(names) > 1)} {' and '.join(names)}")
    return "; ".join(texts) + "."


def image(name: str, text: str, kept: Measurements) -> str:
    """Link a plot if there are measurements for it."""
    known = [plot.name for plot in benchmark_plots(kept)]
    return f"\n\n![{text}](images/{name}.png)" if name in known else ""


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


def headline(kept: Measurements, names: Sequence[str] = ("gemma2-structured", "smollm2")) -> str:
    """README: time, peak and error of every method, the problems next to each other."""
    measured = kept.part("table")
    if measured is None:
        return ""
    rows = kept.of(kind=BOTH)
    shown = [name for name in names if name in set(rows["test_data"])]
    header = ["loss and both gradients"]
    for name in shown:
        header += [f"{data_title(name).split(',')[0]}, ms", "peak, MiB", "error of dE / dC"]
    lines = []
    for method, text in COMPARED.items():
        own = rows[rows["method"] == method].set_index("test_data")
        found = own.loc[[name for name in shown if name in own.index]]
        if found.empty:
            continue
        version = found["version"].iloc[0]
        line = [text.format(version="" if pd.isna(version) else version).strip()]
        for name in shown:
            row = own.loc[name] if name in own.index else pd.Series(dtype=object)
            errors = [number(row.get(f"multiple_{x}"), ".1f") for x in "ec"]
            line += [number(row.get("runtime_ms"), ",.1f"), number(row.get("op_mem_mb"), ",.0f"),
                     " / ".join(errors) if all(errors) else ""]  # fmt: skip
        lines.append(line)
    environment = measured["environment"]
    return f"{table(header, lines)}\n{in_words(environment)}, commit {environment['commit']}."


def models(kept: Measurements) -> str:
    """Our default on the models' shapes."""
    rows = kept.of(method="cce", kind=BOTH).set_index("test_data")
    rows = rows[rows["part"].isin(("table", "shapes"))]
    lines = []
    for shape in SHAPES.values():
        if f"{shape.name}-structured" not in rows.index:
            continue
        row = rows.loc[f"{shape.name}-structured"]
        gradients = (row["tokens"] + row["classes"]) * row["dim"] * 2 / 2**20
        above = row["op_mem_mb"] - gradients
        lines.append(
            [
                f"{shape.title} (V {shape.num_classes:,}, D {shape.dim:,}"
                + (", softcap)" if shape.softcap else ")"),
                f"{row['runtime_ms']:.1f} ms",
                number(row["gemms"]),
                f"{above:.0f} MiB ({above / gradients:.0%})",
                f"{number(row['multiple_e'], '.1f')} / {number(row['multiple_c'], '.1f')}",
            ]
        )
    header = ("classifier", "loss and gradients", "× matmul", "peak beyond the gradients",
              "error of dE / dC, × bf16 rounding")  # fmt: skip
    return table(header, lines)


def all_kinds(rows: pd.DataFrame) -> str:
    """Every method and kind of one problem, as the command's own table shows them."""
    order = rows["kind"].map(KINDS.index)
    rows = rows.assign(order=order).sort_values(["order", "runtime_ms"])
    header = ("method", "kind", "runtime_ms", "op_mem_mb", "× matmul", "TFLOP/s", "error of dE",
              "of dC")  # fmt: skip
    return table(
        header,
        [
            [title(row["method"]), row["kind"], number(row["runtime_ms"], ",.1f"),
             number(row["op_mem_mb"], ",.0f"), number(row["gemms"]), number(row["tflops"], ".0f"),
             error(row, "e"), error(row, "c")]
            for row in rows.to_dict("records")
        ],
    )  # fmt: skip


def by_problem(
    kept: Measurements,
    names: Sequence[str],
    methods: Iterable[str] | None = None,
    device: str | None = None,
) -> str:
    """One line for a problem and method, kinds next to each other, all of one run."""
    device = device or kept.devices[0]
    lines = []
    for name in names:
        measured = in_order(kept.of(device, test_data=name)["method"])
        for method in [m for m in measured if methods is None or m in methods]:
            kinds = kept.one_run(device, name, method)
            if BOTH not in kinds:
                continue
            both = kinds[BOTH]
            lines.append(
                [data_title(name), title(method),
                 *(number(kinds[kind]["gemms"]) if kind in kinds else "" for kind in KINDS),
                 number(both["runtime_ms"]), number(both["op_mem_mb"], ",.0f"), error(both, "e"),
                 error(both, "c")]
            )  # fmt: skip
    header = ("data", "method", "loss", "gradients", "both", "both, ms", "peak, MiB", "error of dE",
              "of dC")  # fmt: skip
    return table(header, lines)


def shapes(kept: Measurements) -> str:
    """Our kernels on all shapes, and which of them other tables have from another run."""
    names = [name for name in kept.problems("table", "shapes") if not name.startswith("smol")]
    text, again = by_problem(kept, names, ("cce", "cce_exact")), []
    for name in names:
        newest = kept.of(test_data=name, method="cce", kind=BOTH)
        own = kept.one_run(kept.devices[0], name, "cce").get(BOTH)
        if own is not None and newest["source"].iloc[0] != own["source"]:
            again.append(
                f"{data_title(name)}, was measured twice: `cce` took {own['runtime_ms']:.1f} ms in "
                f"the run above, which timed this package alone, and "
                f"{newest['runtime_ms'].iloc[0]:.1f} ms in the run of all methods, whose figures "
                "all other tables and plots show."
            )  # fmt: skip
    return "\n".join([text, *again])


def against_others(kept: Measurements) -> str:
    """Our default and the best of everything that is not this package, problem by problem."""
    measures = (("runtime_ms", ",.1f"), ("op_mem_mb", ",.0f"), ("multiple_e", ".2f"),
                ("multiple_c", ".2f"))  # fmt: skip
    lines = []
    for name in kept.problems("table", "tails", "benchmark"):
        rows = kept.of(test_data=name, kind=BOTH).set_index("method")
        # Compiled full logits go by the name of this package's implementation that makes them.
        others = rows.loc[[m for m in rows.index if METHODS[m].peer or m in (
            "baseline", "torch_compile", "torch")]]  # fmt: skip
        if "cce" not in rows.index or set(others.index) <= {"baseline"}:
            continue  # eager full logits are slower than whatever else was not measured there
        cells = [data_title(name)]
        for column, form in measures:
            own, known = rows.loc["cce", column], others[column].dropna().astype(float)
            if pd.isna(own) or known.empty:
                cells.append("")
                continue
            best, method = min(zip(known, known.index, strict=True))
            verdict = "**won**" if own < best else "lost" if own > best else "even"
            cells.append(f"{verdict}: {own:{form}}, {title(method)} {best:{form}}")
        lines.append(cells)
    header = (
        "data",
        "time, ms",
        "peak, MiB",
        "error of dE, × bf16 rounding",
        "error of dC, × bf16 rounding",
    )
    return table(header, lines)


def filter_table(kept: Measurements, device: str | None = None) -> str:
    """What the filter kept and dropped."""
    rows = kept.of(device, method="cce", kind=BOTH, ignored=0.0, frozen=None)
    lines = []
    for name, records in zip(rows["test_data"], rows["filter"], strict=True):
        for found in records[:1] if isinstance(records, list) else []:
            flat = f"{found['flat_tokens']} of {found['tokens']}"
            shares = [f"{found[x]:.2%}" for x in ("strips_kept", "dropped_mass")]
            lines.append([data_title(name), *shares, flat, found["path"]])
    return table(("data", "strips kept", "dropped mass", "flat tokens", "path"), lines)


def cold_starts(kept: Measurements) -> str:
    """First calls from empty caches."""
    rows = kept.rows[kept.rows["device"] == kept.devices[0]]
    rows = rows[rows["cold"].eq(True) & rows["part"].isin(("table", "benchmark"))]
    first = rows.drop_duplicates("method").set_index("method")["first_ms"]
    lines = [[title(m), f"{first[m] / 1e3:.1f} s"] for m in in_order(first.index)]
    return table(("method", "first call"), lines)


def pivot(rows: pd.DataFrame, index: str, form: Callable[[Any, float], str]) -> Any:
    """Return the methods and, for each value of ``index``, cells of ``runtime_ms``."""
    wide = rows.pivot_table(index=index, columns="method", values="runtime_ms", sort=False)
    methods = in_order(wide.columns)
    return methods, {
        key: ["" if pd.isna(x) else form(key, x) for x in line]
        for key, line in zip(wide.index, wide[methods].values.tolist(), strict=True)
    }


def options(kept: Measurements) -> str:
    """Ignored targets and frozen inputs compared with the plain call."""
    rows = kept.of(part="options", kind=BOTH)
    if rows.empty:
        return ""
    methods, cells = pivot(rows, "test_data", lambda _, x: f"{x:.1f} ms")
    lines = []
    for name, line in cells.items():
        what, _, value = name.rpartition("-")
        text = f"{float(value):.0%} of the targets ignored" if what == "ignored" else (
            f"`{value}` needs no gradient")  # fmt: skip
        lines.append([text, *line])
    return table(("", *map(title, methods)), lines)


def sweep(kept: Measurements, size: str) -> str:
    """Time per token or per class as a table and a plot."""
    letter, unit = ("N", "token") if size == "tokens" else ("V", "class")
    rows = kept.of(part="sweeps")
    rows = rows[rows["test_data"].str.startswith(letter)].sort_values(size)
    if rows.empty:
        return ""
    methods, cells = pivot(rows, size, lambda n, x: f"{x * 1e3 / n:.3g}")
    lines = [[f"{n:,}", *line] for n, line in cells.items()]
    text = table((f"{letter}, µs a {unit}", *map(title, methods)), lines)
    return text.strip() + image(f"sweep_{size}", "Time and memory against the size", kept)


def largest(kept: Measurements) -> str:
    """Largest batches."""
    content = kept.part("largest")
    if content is None:
        return ""
    wide = pd.DataFrame(content["rows"]).pivot(index="method", columns="limit_gib", values="tokens")
    most = content["most"]
    lines = [
        [title(m), *("" if pd.isna(n) else f"{n:,.0f}" + " or more" * (n >= most)
                     for n in wide.loc[m])]
        for m in in_order(wide.index)
    ]  # fmt: skip
    return table(("method", *(f"within {limit:g} GiB" for limit in wide.columns)), lines)


def parts(kept: Measurements) -> str:
    """What each part of the filter buys, simulated, with the times of what exists."""
    exists = {"no filter": "cce_exact", "strips and tail, classes by mask": "cce",
              "tiles, classes by mean logit": "apple"}  # fmt: skip
    content = kept.part("simulate")
    if content is None:
        return ""
    lines = []
    for row in content["rows"]:
        method = exists.get(row["part"], "")
        timed = kept.of(test_data=row["test_data"], method=method, kind=BOTH)
        lines.append(
            [data_title(row["test_data"]), row["part"], f"{row['kept']:.1%}",
             *(f"{row[f'error_{x}']:.3%} ({row[f'error_{x}'] / row[f'rounding_{x}']:.1f})"
               for x in "ec"),
             number(row.get("pairs"), ".1f"),
             "" if timed.empty else f"{timed['runtime_ms'].iloc[0]:.1f} ms ({title(method)})"]
        )  # fmt: skip
    header = ("data", "part", "kept", "error of dE", "of dC", "pairs in dC", "time measured")
    return table(header, lines)


def rank_sentence(kept: Measurements) -> str:
    """The rank curve in words."""
    content = kept.part("ranks")
    return "\n".join(
        f"{data_title(name)}, {curve['tokens']:,} tokens: on average "
        f"{curve['above_cutoff']:.0f} of {curve['classes']:,} classes lie above the cut-off, and "
        f"they hold {curve['mass_above_cutoff']:.1%} of the probability."
        for name, curve in (content["curves"] if content else {}).items()
    )


def errors_sentence(kept: Measurements) -> str:
    """The range of the errors of our default."""
    rows = kept.of(method="cce", kind=BOTH)[["multiple_e", "multiple_c"]].dropna(how="all")
    if rows.empty:
        return ""
    ranges = (f"d{x.upper()} {rows[f'multiple_{x}'].min():.1f} to {rows[f'multiple_{x}'].max():.1f}"
              for x in "ec")  # fmt: skip
    return (
        f"Measured for `cce` on the {kept.devices[0]}, in multiples of the bf16 rounding error: "
        f"{', '.join(ranges)} ({len(rows)} problems)."
    )


def spread(kept: Measurements) -> str:
    """How far repetitions lie apart."""
    rows = kept.rows[(kept.rows["device"] == kept.devices[0]) & (kept.rows["repetitions"] > 3)]
    shares = (rows["q3_ms"] - rows["q1_ms"]) / rows["runtime_ms"]
    if shares.empty:
        return ""
    tenth = shares.quantile(0.9, interpolation="higher")
    return (f"Between the quartiles of the repetitions of a row lie {shares.median():.1%} of its "
            f"median (median row), {tenth:.1%} for one row in ten.")  # fmt: skip


def failures(kept: Measurements) -> str:
    """What could not be measured, and why; a method that ran out of time is named once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for file, content in kept.files.items():
        if content["environment"]["device"] != kept.devices[0]:
            continue
        for failure in content.get("failures", []):
            reason = failure["error"].split(". ")[0]
            if re.fullmatch(r"no answer within (-\d+|0) s", reason):
                reason = "no time was left"
            what = "" if reason == "no time was left" else f" ({failure.get('what', '')})"
            key = (file, data_title(failure.get("test_data", "")), reason)
            found.setdefault(key, []).append(title(failure["method"]) + what)
    return "\n".join(
        f"- {file}: {data}{': ' if data else ''}{', '.join(dict.fromkeys(methods))}: {reason}"
        for (file, data, reason), methods in found.items()
    ) or "Nothing failed."  # fmt: skip


def other_devices(kept: Measurements) -> str:
    """Everything that was measured elsewhere."""
    text = []
    for device in kept.devices[1:]:
        own = kept.rows[kept.rows["device"] == device]
        if not own.empty:
            text += [f"### {device}\n", where(kept, device) + "\n",
                     by_problem(kept, list(dict.fromkeys(own["test_data"])), device=device),
                     filter_table(kept, device)]  # fmt: skip
    return "\n".join(text)


def files(kept: Measurements) -> str:
    """Every file and where it comes from."""
    place = {device: i for i, device in enumerate(kept.devices)}
    by_device = sorted(kept.files.items(), key=lambda item: place[item[1]["environment"]["device"]])
    return table(
        ("file", "device", "PyTorch", "Triton", "commit", "rows"),
        [
            [f"[{name}](measurements/{name})",
             *(content["environment"][key] for key in ("device", "torch", "triton", "commit")),
             str(len(content.get("rows", content.get("curves", []))))]
            for name, content in by_device
        ],
    )  # fmt: skip


def table_one(kept: Measurements) -> str:
    """The paper's Table 1."""
    name = "gemma2-structured"
    text = all_kinds(kept.of(test_data=name))
    return text.strip() + image(f"bars_{name}", "Time and memory of all methods", kept)


def training_processes(kept: Measurements) -> str:
    """One training in one process and in several."""
    from training import compare_processes

    return "\n".join(map(compare_processes.table, kept.parts(compare_processes.PART)))


def arguments(_: Measurements) -> str:
    """Arguments of the training script."""
    from training.arguments import build_parser
    from training.arguments import table as of_parser

    return of_parser(build_parser())


BLOCKS: dict[str, Callable[[Measurements], str]] = {
    "headline": headline,
    "models": models,
    "where": where,
    "spread": spread,
    "table-1": table_one,
    "all-methods": lambda kept: by_problem(
        kept, [name for name in kept.problems("table") if name != "gemma2-structured"]
    ),
    "against-others": against_others,
    "shapes": shapes,
    "tails": lambda kept: by_problem(kept, kept.problems("tails")),
    "filter": filter_table,
    "cold-starts": cold_starts,
    "options": options,
    "sweep-tokens": lambda kept: sweep(kept, "tokens"),
    "sweep-classes": lambda kept: sweep(kept, "classes"),
    "largest": largest,
    "parts": parts,
    "ranks": rank_sentence,
    "errors": errors_sentence,
    "failures": failures,
    "other-devices": other_devices,
    "files": files,
    "distributed": lambda kept: processes.page(kept.parts("distributed")),
    "training-processes": training_processes,
    "arguments": arguments,
}


def benchmark_plots(kept: Measurements) -> list[plots.Plot]:
    """Return every plot that the main device's measurements suffice for."""
    device = kept.devices[0]
    usual = kept.rows[kept.rows["device"] == device]
    if usual.empty:
        return []
    first = usual.iloc[0]
    plain = {"kind": BOTH, "ignored": first["ignored"], "frozen": first["frozen"]}
    if pd.isna(plain["frozen"]):
        plain["frozen"] = None
    found: list[plots.Plot | None] = []
    for name in dict.fromkeys(usual["test_data"]):
        rows = kept.of(test_data=name, **plain)
        rows = rows[rows["part"].isin(("table", "benchmark"))]
        if not rows.empty:
            found.append(plots.bars(rows, f"bars_{name}", device))
    swept = kept.of(part="sweeps", **plain)
    in_suite = not swept.empty
    swept = swept if in_suite else kept.of(part="benchmark", **plain)
    for size, other in (("tokens", "classes"), ("classes", "tokens")):
        if swept.empty:
            break
        rows = swept[swept[other] == swept[other].mode().max()]
        if in_suite:  # its two sweeps have a point in common
            rows = rows[rows["test_data"].str.startswith("N" if size == "tokens" else "V")]
        if rows["dim"].nunique() == 1:
            found.append(plots.sweep(rows, f"sweep_{size}", size, device))
    found.append(plots.speed_error(kept.of(kind=BOTH), "speed_error", device))
    return [plot for plot in found if plot is not None]


def pages(root: Path, kept: Measurements, runs: training_runs.Records) -> dict[Path, str]:
    """Return the text that every page should have, by its path below ``root``.

    Raises:
        ValueError: a marker without its other half, or a block that nobody makes.
    """
    blocks: dict[str, Callable[[], str]] = {
        **{name: lambda make=make: make(kept) for name, make in BLOCKS.items()},
        **{
            name: lambda name=name: training_runs.section(name, runs)
            for name in training_runs.NAMES
        },
    }
    return {page: fill((root / page).read_text(encoding="utf-8"), blocks) for page in PAGES}


def all_plots(kept: Measurements, runs: training_runs.Records) -> list[plots.Plot]:
    """Return all plots of the documentation."""
    content = kept.part("ranks")
    rank_plots = [plots.ranks(content)] if content else []
    return [plots.strips(), *benchmark_plots(kept), *rank_plots, *training_runs.plots_of(runs)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 done, 1 stale (with ``--check``), 2 wrong input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="JSON files to show instead")
    parser.add_argument("--plots", type=Path, help="folder for the plots of FILES")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--check", action="store_true", help="fail if something is stale")
    parsed = parser.parse_args(argv)
    try:
        if parsed.files:
            show(parsed.files, parsed.plots)
            return 0
        kept = read(parsed.root / "docs/measurements")
        runs = training_runs.read(parsed.root / "docs/measurements/experiments")
        made = pages(parsed.root, kept, runs)
    except (ValueError, OSError) as error:
        print(f"make.py: error: {error}", file=sys.stderr)
        return 2
    folder = parsed.root / "docs/images"
    old_pages = [p for p, text in made.items() if text != (parsed.root / p).read_text("utf-8")]
    old_plots = [plot for plot in all_plots(kept, runs) if not plot.is_current(folder)]
    if parsed.check:
        names = [str(page) for page in old_pages] + [f"docs/images/{p.name}.png" for p in old_plots]
        if names:
            print(f"stale, run python docs/make.py: {', '.join(names)}", file=sys.stderr)
        return int(bool(names))
    for page in old_pages:
        (parsed.root / page).write_text(made[page], encoding="utf-8")
        print(page)
    for plot in old_plots:
        print(plot.save(folder))
    return 0


def show(paths: Sequence[Path], folder: Path | None) -> None:
    """Print the tables of some files, and draw their plots into ``folder``."""
    kept = collect({str(path): json.loads(path.read_text(encoding="utf-8")) for path in paths})
    names = list(dict.fromkeys(kept.rows["test_data"]))
    print(where(kept), by_problem(kept, names), filter_table(kept), failures(kept), sep="\n\n")
    for plot in benchmark_plots(kept) if folder else []:
        print(plot.save(folder))


if __name__ == "__main__":
    sys.exit(main())
