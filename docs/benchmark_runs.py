"""Tables of the benchmark's files: README.md, docs/benchmarks.md and docs/numerics.md."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from cut_cross_entropy.benchmark.environment import in_words
from cut_cross_entropy.benchmark.kinds import KINDS
from cut_cross_entropy.benchmark.methods import METHODS
from cut_cross_entropy.benchmark.output import COLUMNS, MORE
from cut_cross_entropy.benchmark.shapes import SHAPES
from docs import plots
from docs.page import NOTHING, Column, Row, cell, table

BOTH = "loss-fw-bw"
PROBLEM = ["test_data", "method"]
ONE_SIDED = ("cce_exact_c", "cce_exact_e")  # shown with the aims of the exact sums
OWN_TABLES = ("comparison", "chunked", "sweeps", "tails")
"""Parts that are shown of any device, and not among all its problems."""
MEASURED = ["device", "source", "part", *COLUMNS, *MORE, "gemm_even", "filter"]


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured.

    Args:
        files: content of every JSON file by its path, later measurements last.
        rows: all rows of the benchmark, with ``device``, ``source`` (the path) and ``part``;
            ``title`` and ``data`` name method and problem; ``multiple_e`` and ``multiple_c`` are
            errors as multiples of bfloat16 rounding. Methods sort in the order of the benchmark.
        devices: names, the one with the most rows first.
    """

    files: dict[str, dict[str, Any]]
    rows: pd.DataFrame
    devices: list[str]

    def on(self, device: str | None = None) -> pd.DataFrame:
        """Return all rows of a device, by default of the first."""
        return self.rows[self.rows["device"] == (device or self.devices[0])]

    def of(self, device: str | None = None, **equal: Any) -> pd.DataFrame:
        """Return the newest row of every problem, method and kind, of one device.

        Args:
            device: its name; the first one by default.
            **equal: values of columns.
        """
        found = self.on(device)
        for column, value in equal.items():
            found = found[found[column].isna() if value is None else found[column] == value]
        return found.drop_duplicates([*PROBLEM, "kind"], keep="last")

    def whole_runs(self, device: str | None = None) -> pd.DataFrame:
        """Return the rows of one run for every problem and method: of the runs with the most
        kinds the latest.
        """
        rows = self.on(device)
        runs = rows.groupby([*PROBLEM, "source"], observed=True)["kind"].transform("nunique")
        rows = rows[
            runs == runs.groupby([rows[x] for x in PROBLEM], observed=True).transform("max")
        ]
        last = rows.groupby(PROBLEM, observed=True)["source"].transform("last")
        return rows[rows["source"] == last].drop_duplicates([*PROBLEM, "kind"], keep="last")

    def parts(self, name: str) -> list[dict[str, Any]]:
        """Return the files of a part that has a form of its own, the main device's first."""
        found = [content for content in self.files.values() if content.get("part") == name]
        return sorted(found, key=lambda each: self.devices.index(each["environment"]["device"]))

    def problems(self, *parts: str) -> list[str]:
        """Return the problems of some parts in the order of their measurement."""
        rows = self.on()
        return list(dict.fromkeys(rows[rows["part"].isin(parts)]["test_data"]))


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
        found = [row for row in content.get("rows", []) if row.get("kind") in KINDS]
        own = content.get("part") in OWN_TABLES
        count[device] = count.get(device, 0) + len(found) * (not own)
        where = {"device": device, "source": source, "part": content.get("part", "benchmark")}
        rows += [{**row, **where} for row in found]
    frame = pd.DataFrame(rows, columns=MEASURED)
    frame["title"], frame["data"] = frame["method"].map(title), frame["test_data"].map(data_title)
    order = dict.fromkeys([*METHODS, *frame["method"]])
    frame["method"] = pd.Categorical(frame["method"], list(order), ordered=True)
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


def title(method: str) -> str:
    """Name a method in a table."""
    return METHODS[method].title if method in METHODS else f"`{method}`"


REAL = {
    **dict.fromkeys(("smollm2", "smol"), "SmolLM2, real text"),
    **dict.fromkeys(("gemma3-270m", "gemma3-270m-t", "gemma"), "Gemma 3 270M, real text"),
}
"""Titles of hidden states and output layers of real models."""


def data_title(name: str) -> str:
    """Name a problem in a table."""
    model, _, kind = name.rpartition("-")
    if model in SHAPES:
        return f"{SHAPES[model].title}, {kind}"
    return REAL.get(name, name)


def error(name: str) -> Callable[[Row], str]:
    """Return a column: an error in percent, and as a multiple of rounding the exact gradient."""
    share, multiple = f"{{error_{name}:.2%}}", f" ({{multiple_{name}:.1f}})"
    return lambda row: cell(row, share) and cell(row, share) + cell(row, multiple)


ERRORS: list[Column] = [("error of dE", error("e")), ("of dC", error("c"))]
MULTIPLES = "{multiple_e:.1f} / {multiple_c:.1f}"

COMPARED = {
    "cce": "**this package**, `cce`",
    "cce_exact": "**this package**, `cce_exact`",
    "torch_compile": "full logits, `torch.compile`",
    "baseline": "full logits, eager",
    "trl": "TRL {version}",
    "apple": "Apple's `cut_cross_entropy` {version}",
    "liger": "Liger {version}",
    "quack": "quack {version}",
}
"""Lines of the README's table."""


HEADLINE = {
    "comparison": ("gemma3-270m", "gemma2-broad"),
    "table": ("gemma2-structured", "smollm2"),
}
"""Problems of the README's table by the part of the suite that they are of, most wanted first."""


def headline_rows(kept: Measurements) -> pd.DataFrame:
    """Return the rows of loss and gradients of the problems of :data:`HEADLINE`."""
    part = next((part for part in HEADLINE if kept.parts(part)), "")
    if not part:
        return kept.rows[:0]
    # The table's rows may be of a later run of one method, as in all tables.
    only = {"part": part} if part == "comparison" else {}
    rows = kept.of(kept.parts(part)[0]["environment"]["device"], kind=BOTH, **only)
    return rows[rows["test_data"].isin(HEADLINE[part])]


def headline(kept: Measurements) -> str:
    """README: time, peak and error of every method, the problems next to each other."""
    rows = headline_rows(kept)
    if rows.empty:
        return ""
    names = next(names for part, names in HEADLINE.items() if kept.parts(part))
    versions = (
        rows.drop_duplicates("method").set_index("method")["version"].astype(object).fillna("")
    )
    lines = [{"method": m, "name": text.format(version=versions[m]).strip()}
             for m, text in COMPARED.items() if m in versions.index]  # fmt: skip
    columns: list[Column] = [("loss and both gradients", "{name}")]
    for name in (name for name in names if name in set(rows["test_data"])):
        some = rows[rows["test_data"] == name]
        own = some.set_index("method").to_dict("index")
        measures = [(f"{data_title(name).split(',')[0]}, ms", "{runtime_ms:,.1f}"),
                    ("peak, MiB", "{op_mem_mb:,.0f}"), ("error of dE / dC", MULTIPLES)]  # fmt: skip
        for heading, text in measures[: 3 if some["multiple_e"].notna().any() else 2]:
            columns.append(
                (heading, lambda row, own=own, text=text: cell(own.get(row["method"], {}), text))
            )
    return f"{in_short(kept, rows)}{table(lines, columns)}\n{where_from(kept, rows)}"


def in_short(kept: Measurements, rows: pd.DataFrame) -> str:
    """Say how the first problem's `cce` compares with compiled full logits, and what newer ones do.

    Args:
        kept: everything that was measured.
        rows: of the table, loss and gradients by each method.
    """
    text = ""
    for name, own in rows.groupby("test_data", sort=False):
        by_method = own.set_index("method")
        if name in REAL and {"cce", "torch_compile"} <= set(by_method.index):
            ours, full = by_method.loc["cce"], by_method.loc["torch_compile"]
            faster, smaller = (full[x] / ours[x] for x in ("runtime_ms", "op_mem_mb"))
            text += (f"For {data_title(name).split(',')[0]} `cce` is {faster:.1f} times as fast as "
                     f"compiled full logits, with 1/{smaller:.0f} of the memory.")  # fmt: skip
    return f"{text}{newer(kept, rows)}\n\n" if text else ""


def newer(kept: Measurements, rows: pd.DataFrame) -> str:
    """Return what `cce` took at the commit of the aims, "" if the rows are of that commit."""
    found = kept.parts("aims")
    commits = {kept.files[x]["environment"]["commit"] for x in rows["source"].unique()}
    if not found or found[0]["environment"]["commit"] in commits:
        return ""
    of_table = rows[rows["method"] == "cce"].set_index("test_data")["runtime_ms"]
    texts = []
    for row in found[0]["rows"]:
        if row["test_data"] in of_table:
            head = data_title(row["test_data"]).split(",")[0]
            ms = row["time"] * row["gemm_ms"][0]
            texts.append(f"{ms:.1f} ms ({head}, {ms / of_table[row['test_data']] - 1:+.0%}, errors "
                         f"{row['error_e']:.1f} / {row['error_c']:.1f})")  # fmt: skip
    commit = found[0]["environment"]["commit"]
    return (
        f" `cce` of commit {commit}, in the run of the "
        f"[aims](docs/benchmarks.md#aims-of-the-filter): {', '.join(texts)}. "
        "Runs differ by [several percent](docs/engineering_log.md)."
    ) * bool(texts)


def models(kept: Measurements) -> str:
    """Our default on the models' shapes."""
    rows = kept.of(method="cce", kind=BOTH)
    rows = rows[rows["part"].isin(("table", "shapes"))].set_index("test_data")
    shapes = {f"{shape.name}-structured": shape for shape in SHAPES.values()}
    rows = rows.loc[[name for name in shapes if name in rows.index]]
    gradients = (rows["tokens"] + rows["classes"]) * rows["dim"] * 2 / 2**20
    above = rows["op_mem_mb"] - gradients
    head = [f"{shapes[name].title} (V {shapes[name].num_classes:,}, D {shapes[name].dim:,}"
            + ", softcap" * bool(shapes[name].softcap) + ")" for name in rows.index]  # fmt: skip
    return table(
        rows.assign(head=head, above=above, share=above / gradients),
        [("classifier", "{head}"), ("loss and gradients", "{runtime_ms:.1f} ms"),
         ("× matmul", "{gemms:.2f}"),
         ("peak beyond the gradients", "{above:.0f} MiB ({share:.0%})"),
         ("error of dE / dC, × bf16 rounding", MULTIPLES)],
    )  # fmt: skip


def all_kinds(rows: pd.DataFrame) -> str:
    """Every method and kind of one problem, as the command's own table shows them."""
    rows = rows.assign(order=rows["kind"].map(KINDS.index)).sort_values(["order", "runtime_ms"])
    return table(
        rows,
        [("method", "{title}"), ("kind", "{kind}"), ("runtime_ms", "{runtime_ms:,.1f}"),
         ("op_mem_mb", "{op_mem_mb:,.0f}"), ("× matmul", "{gemms:.2f}"),
         ("TFLOP/s", "{tflops:.0f}"), *ERRORS],
    )  # fmt: skip


def by_problem(
    kept: Measurements,
    names: Sequence[str],
    methods: Sequence[str] = (),
    device: str | None = None,
) -> str:
    """One line for a problem and method, by default all, kinds next to each other, of one run."""
    runs = kept.whole_runs(device)
    runs = runs[runs["test_data"].isin(names) & (runs["method"].isin(methods) | (not methods))]
    kinds = runs.pivot(index=PROBLEM, columns="kind", values="gemms").reindex(columns=KINDS)
    rows = runs[runs["kind"] == BOTH].join(kinds, on=PROBLEM).sort_values(
        PROBLEM, key=lambda x: x.map(list(names).index) if x.name == "test_data" else x
    )  # fmt: skip
    return table(
        rows,
        [("data", "{data}"), ("method", "{title}"), ("loss", "{loss-fw:.2f}"),
         ("gradients", "{loss-bw:.2f}"), ("both", "{loss-fw-bw:.2f}"),
         ("both, ms", "{runtime_ms:.2f}"), ("peak, MiB", "{op_mem_mb:,.0f}"), *ERRORS],
    )  # fmt: skip


def shapes(kept: Measurements) -> str:
    """Our kernels on all shapes, and which of them other tables have from another run."""
    names = [name for name in kept.problems("table", "shapes") if not name.startswith("smol")]
    newest = kept.of(method="cce", kind=BOTH).set_index("test_data")
    runs = kept.whole_runs()
    runs = runs[(runs["method"] == "cce") & (runs["kind"] == BOTH)].set_index("test_data")
    return "\n".join([by_problem(kept, names, ("cce", "cce_exact")), *(
        f"{data_title(name)}, was measured twice: `cce` took {runs['runtime_ms'][name]:.1f} ms in "
        "the run above, which timed this package alone, and "
        f"{newest['runtime_ms'][name]:.1f} ms in the run of all methods, whose figures all other "
        "tables and plots show."
        for name in names
        if name in runs.index and newest["source"][name] != runs["source"][name]
    )])  # fmt: skip


def against_others(kept: Measurements) -> str:
    """Our default and the best of everything that is not this package, problem by problem."""
    # Compiled full logits go by the name of this package's implementation that makes them.
    other = {m for m, method in METHODS.items() if method.peer} | {"baseline", "torch_compile",
                                                                   "torch"}  # fmt: skip
    measures = {"time, ms": ("runtime_ms", ",.1f"), "peak, MiB": ("op_mem_mb", ",.0f"),
                "error of dE, × bf16 rounding": ("multiple_e", ".2f"),
                "error of dC, × bf16 rounding": ("multiple_c", ".2f")}  # fmt: skip
    lines = []
    for name in kept.problems("table", "tails", "benchmark"):
        rows = kept.of(test_data=name, kind=BOTH).set_index("method")
        others = rows[rows.index.isin(other)]
        if "cce" not in rows.index or set(others.index) <= {"baseline"}:
            continue  # eager full logits are slower than whatever else was not measured there
        line = {"data": data_title(name)}
        for heading, (column, form) in measures.items():
            own, known = rows.loc["cce", column], others[column].dropna().astype(float)
            if pd.isna(own) or known.empty:
                continue
            best = known.min()
            verdict = "**won**" if own < best else "lost" if own > best else "even"
            line[heading] = f"{verdict}: {own:{form}}, {title(known.idxmin())} {best:{form}}"
        lines.append(line)
    return table(lines, [("data", "{data}"), *((name, f"{{{name}}}") for name in measures)])


def comparison(kept: Measurements) -> str:
    """Every method on every problem of the suite's part: time, peak, error, and what was lost."""
    found = kept.parts("comparison")
    if not found:
        return ""
    device = found[0]["environment"]["device"]
    rows = kept.of(device, part="comparison", kind=BOTH)
    rows = rows[~rows["method"].isin(ONE_SIDED)]
    # Real heads first, of whichever file.
    rows = rows.sort_values("test_data", key=lambda names: ~names.isin(REAL), kind="stable")
    measures = {
        "time, ms (× matmul)": ("runtime_ms", "{runtime_ms:,.1f} ({gemms:.2f})"),
        "peak, MiB": ("op_mem_mb", "{op_mem_mb:,.0f}"),
        "error of dE / dC, × bf16 rounding": ("multiple_e", MULTIPLES),
    }
    texts, lost = [], list[str]()
    for heading, (column, form) in measures.items():
        lines = []
        for data, own in rows[rows[column].notna()].groupby("data", sort=False):
            by_method = own.set_index("method").to_dict("index")
            best = own.set_index("method")[column].astype(float).idxmin()
            cells = {method: cell(values, form) for method, values in by_method.items()}
            if "cce" in cells and best != "cce":
                what = heading.split(",")[0]
                lost.append(f"- {data}, {what}: {cells['cce']}, {title(best)} {cells[best]}")
            cells[best] = f"**{cells[best]}**"
            lines.append({"data": data, **cells})
        methods = [method for method in METHODS if any(method in line for line in lines)]
        columns = [(title(method), f"{{{method}}}") for method in methods]
        texts.append(table(lines, [(heading, "{data}"), *columns]))
    if lost:
        texts.append("Where another method is better than `cce`:\n\n" + "\n".join(lost) + "\n")
    measured = set(rows[PROBLEM].itertuples(index=False, name=None))
    everything = set(rows["method"])
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for failure in found[0].get("failures", []):
        if (failure["test_data"], failure["method"]) not in measured:
            key = data_title(failure["test_data"]), failure["error"].removeprefix("not measured: ")
            some = everything if failure["method"] == "all" else [failure["method"]]
            reasons.setdefault(key, {}).update(dict.fromkeys(some))
    lacking = [
        f"- {data}, {'all' if everything <= {*methods} else ', '.join(map(title, methods))}: {why}"
        for (data, why), methods in reasons.items()
    ]
    if lacking:
        texts.append("Not measured:\n\n" + "\n".join(lacking) + "\n")
    return "\n".join([*texts, where_from(kept, rows)])


def filter_table(kept: Measurements, device: str | None = None) -> str:
    """Return the table of what the filter kept and dropped."""
    rows = kept.of(device, method="cce", kind=BOTH, ignored=0.0, frozen=None)
    found = [{"data": data, **records[0]} for data, records in zip(rows["data"], rows["filter"],
             strict=True) if isinstance(records, list) and records]  # fmt: skip
    return table(
        found,
        [("data", "{data}"), ("strips kept", "{strips_kept:.2%}"),
         ("dropped mass", "{dropped_mass:.2%}"), ("flat tokens", "{flat_tokens} of {tokens}"),
         ("path", "{path}")],
    )  # fmt: skip


def cold_starts(kept: Measurements) -> str:
    """First calls from empty caches."""
    rows = kept.on()
    rows = rows[rows["cold"].eq(True) & rows["part"].isin(("table", "benchmark"))]
    rows = rows.drop_duplicates("method").sort_values("method")
    rows = rows.assign(seconds=rows["first_ms"] / 1e3)
    return table(rows, [("method", "{title}"), ("first call", "{seconds:.1f} s")])


def by_method(rows: pd.DataFrame, heading: str, form: str) -> str:
    """A line for each ``line`` of the rows, a column for each method with its ``value``."""
    wide = rows.pivot_table("value", "line", "method", sort=False, observed=True).sort_index(axis=1)
    wide.columns = list(wide.columns)
    columns = [(title(method), form.replace("value", method)) for method in wide.columns]
    return table(wide.reset_index(), [(heading, "{line}"), *columns])


def options(kept: Measurements) -> str:
    """Ignored targets and frozen inputs compared with the plain call."""
    rows = kept.of(part="options", kind=BOTH)
    line = [f"`{frozen}` needs no gradient" if isinstance(frozen, str) else
            f"{ignored:.0%} of the targets ignored"
            for ignored, frozen in zip(rows["ignored"], rows["frozen"], strict=True)]  # fmt: skip
    return by_method(rows.assign(line=line, value=rows["runtime_ms"]), "", "{value:.1f} ms")


def sweep(kept: Measurements, size: str) -> str:
    """Time per token or per class as a table and a plot."""
    letter, unit = ("N", "token") if size == "tokens" else ("V", "class")
    rows = swept(sweeps_of(kept), size).sort_values(size)
    source = where_from(kept, rows)
    value = rows["runtime_ms"] * 1e3 / rows[size]
    rows = rows.assign(line=rows[size].map("{:,}".format), value=value)
    text = by_method(rows, f"{letter}, µs a {unit}", "{value:.3g}")
    plot = image(f"sweep_{size}", "Time and memory against the size", kept)
    return f"{text.strip()}\n\n{source}{plot}"


def sweeps_of(kept: Measurements) -> pd.DataFrame:
    """Return the rows of sweeps, of the first device that has any."""
    found = kept.parts("sweeps")
    return kept.of(found[0]["environment"]["device"] if found else None, part="sweeps")


def swept(rows: pd.DataFrame, size: str) -> pd.DataFrame:
    """Return the rows that are alike but in ``size``, those named after it if there are any."""
    letter, other = ("N", "classes") if size == "tokens" else ("V", "tokens")
    named = rows[rows["test_data"].str.contains(rf"(?:^|-){letter}\d+$")]
    rows = rows if named.empty else named
    return rows[rows[other] == rows[other].mode().max()]


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
    """Return the table of how far repetitions lie apart."""
    rows = kept.on()
    rows = rows[rows["repetitions"] > 3]
    shares = (rows["q3_ms"] - rows["q1_ms"]) / rows["runtime_ms"]
    if shares.empty:
        return ""
    tenth = shares.quantile(0.9, interpolation="higher")
    return (f"Between the quartiles of the repetitions of a row lie {shares.median():.1%} of its "
            f"median (median row), {tenth:.1%} for one row in ten.")  # fmt: skip


def failures(kept: Measurements) -> str:
    """Name what could not be measured, and why; a method that ran out of time is named once."""
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


def where(kept: Measurements, device: str | None = None) -> str:
    """Name the device, the versions and the commits of the benchmark's rows."""
    device = device or kept.devices[0]
    apart = ("distributed", "training-processes")
    found = [
        content["environment"]
        for content in kept.files.values()
        if content.get("part") not in apart
    ]
    return _in_words(one for one in found if one["device"] == device)


def where_from(kept: Measurements, rows: pd.DataFrame) -> str:
    """Name the device, the versions and the commits of some rows."""
    return _in_words(kept.files[source]["environment"] for source in rows["source"].unique())


def _listed(names: Iterable[str]) -> str:
    """Return names as a list in a sentence."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _in_words(environments: Iterable[dict[str, Any]]) -> str:
    commits: dict[str, dict[str, None]] = {}
    for found in environments:
        commits.setdefault(in_words(found), {})[found["commit"]] = None
    texts = (f"{text}, commit{'s' * (len(names) > 1)} {_listed(names)}"
             for text, names in commits.items())  # fmt: skip
    return "; ".join(texts) + "."


def other_devices(kept: Measurements) -> str:
    """Everything that was measured elsewhere."""
    text = []
    for device in kept.devices[1:]:
        rows = kept.on(device)
        names = list(dict.fromkeys(rows[~rows["part"].isin(OWN_TABLES)]["test_data"]))
        if names:
            tables = by_problem(kept, names, device=device), filter_table(kept, device)
            text += [f"### {device}\n", where(kept, device) + "\n", *tables]
    return "\n".join(text)


RECORDS = ("rows", "curves", "problems")
"""Names that files have for the records in them."""


def raw_files(kept: Measurements) -> str:
    """Every file and where it comes from."""
    rows = [
        {"name": name, "count": max(len(content.get(key, ())) for key in RECORDS),
         **content["environment"]}
        for name, content in kept.files.items()
    ]  # fmt: skip
    return table(
        sorted(rows, key=lambda row: kept.devices.index(row["device"])),
        [("file", "[{name}](measurements/{name})"), ("device", "{device}"), ("PyTorch", "{torch}"),
         ("Triton", "{triton}"), ("commit", "{commit}"), ("rows", "{count}")],
    )  # fmt: skip


def table_one(kept: Measurements) -> str:
    """The paper's Table 1, of the first device that has it."""
    name = "gemma2-structured"
    found = [kept.of(device, test_data=name, part="table") for device in kept.devices]
    rows = next((rows for rows in found if len(rows)), kept.rows[:0])
    text = f"{all_kinds(rows).strip()}\n\n{where_from(kept, rows)}" if len(rows) else NOTHING
    return text + image(f"bars_{name}", "Time and memory of all methods", kept)


def all_methods(kept: Measurements) -> str:
    """The problems of the table that the paper does not have."""
    return by_problem(kept, [x for x in kept.problems("table") if x != "gemma2-structured"])


def other_data(kept: Measurements) -> str:
    """Return the problems of the part for them, of the first device that has it."""
    found = kept.parts("tails")
    if not found:
        return ""
    names = list(dict.fromkeys(row["test_data"] for row in found[0]["rows"]))
    device = found[0]["environment"]["device"]
    rows = kept.of(device, part="tails", kind=BOTH)
    return f"{by_problem(kept, names, device=device)}\n{where_from(kept, rows)}"


BLOCKS: dict[str, Callable[[Measurements], str]] = {
    "headline": headline,
    "models": models,
    "where": where,
    "spread": spread,
    "table-1": table_one,
    "all-methods": all_methods,
    "against-others": against_others,
    "comparison": comparison,
    "shapes": shapes,
    "tails": other_data,
    "filter": filter_table,
    "cold-starts": cold_starts,
    "options": options,
    "sweep-tokens": partial(sweep, size="tokens"),
    "sweep-classes": partial(sweep, size="classes"),
    "errors": errors_sentence,
    "failures": failures,
    "other-devices": other_devices,
    "files": raw_files,
}


def image(name: str, text: str, kept: Measurements) -> str:
    """Link a plot if there are measurements for it."""
    known = [plot.name for plot in plots_of(kept)]
    return f"\n\n![{text}](images/{name}.png)" if name in known else ""


def plots_of(kept: Measurements) -> list[plots.Plot]:
    """Return every plot that the main device's measurements suffice for."""
    usual = kept.on()
    if usual.empty:
        return []
    ignored, frozen = usual.iloc[0][["ignored", "frozen"]]
    rows = kept.of(kind=BOTH, ignored=ignored, frozen=None if pd.isna(frozen) else frozen)
    tables = rows[rows["part"].isin(("table", "benchmark"))]
    found = [plots.bars(tables[tables["test_data"] == name], f"bars_{name}")
             for name in dict.fromkeys(usual["test_data"])]  # fmt: skip
    sweeps = sweeps_of(kept)
    sweeps = rows[rows["part"] == "benchmark"] if sweeps.empty else sweeps
    found += [plots.sweep(swept(sweeps, x), f"sweep_{x}", x) for x in ("tokens", "classes")]
    found.append(plots.speed_error(kept.of(kind=BOTH), "speed_error"))
    return [plot for plot in found if plot is not None]
