"""Tables of post-training: the benchmark's kinds with results for each token, and runs of TRL."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cut_cross_entropy.benchmark.environment import in_words
from cut_cross_entropy.benchmark.kinds import parse
from cut_cross_entropy.benchmark.methods import METHODS
from docs.benchmark_runs import Measurements, data_title, title
from docs.page import Column, Row, cell, table, without_paths

TRAINERS = ("grpo", "grpo_bf16", "dpo", "dpo_bf16")
LAYERS = {
    "trl": "TRL's",
    "token_logprobs": "`token_logprobs`",
    "trl_reordered": "TRL's, sums reordered",
}
LAST_STEPS = 8
"""Steps whose figures are averaged at the end of a run."""

Records = dict[str, list[dict[str, Any]]]
"""Records by the name of the experiment."""


def rows_of(kept: Measurements, subject: str) -> pd.DataFrame:
    """Return the newest row of each device, problem, method and kind of a subject."""
    rows = [
        {**row, "device": content["environment"]["device"], "where": _where(content),
         "source": source}
        for source, content in kept.files.items()
        for row in content.get("rows", [])
        if _subject(row) == subject
    ]  # fmt: skip
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    frame = frame.drop_duplicates(["device", "test_data", "method", "kind"], keep="last")
    order = list(METHODS)
    return frame.assign(
        title=frame["method"].map(_title_with_version(frame)),
        place=frame["method"].map(lambda name: order.index(name) if name in order else len(order)),
    )


def _subject(row: Row) -> str:
    try:
        return parse(row["kind"]).subject
    except (KeyError, ValueError):
        return ""


def _where(content: Mapping[str, Any]) -> str:
    environment = content["environment"]
    where, command = in_words(environment), without_paths(content["command"])
    return f"{where}, commit {environment['commit']}: `{command}`"


def _title_with_version(frame: pd.DataFrame) -> dict[str, str]:
    versions = dict(zip(frame["method"], frame.get("version", frame["method"]), strict=True))
    return {
        name: f"{title(name)} {version}" if name in METHODS and METHODS[name].peer else title(name)
        for name, version in versions.items()
    }


def _multiple(name: str) -> Column:
    """Return a column with the error of a gradient as a multiple of bfloat16 rounding."""

    def show(row: Row) -> str:
        rounding = row.get(f"rounding_{name}")
        if not rounding or pd.isna(rounding) or pd.isna(row.get(f"error_{name}")):
            return ""
        return f"{row[f'error_{name}'] / rounding:.1f}"

    return f"d{name.upper()}, × rounding", show


def _by_kind(rows: pd.DataFrame, errors: Sequence[Column]) -> str:
    """Return a table for each problem: every kind, its methods by time."""
    parts = []
    for (device, data), own in rows.groupby(["device", "test_data"], sort=False):
        first = own.iloc[0]
        sizes = f"N {first['tokens']:,}, V {first['classes']:,}, D {first['dim']:,}"
        head = f"**{data_title(str(data))}**: {sizes}, {first['dtype']}; {device}."
        order = {kind: number for number, kind in enumerate(dict.fromkeys(own["kind"]))}
        own = own.assign(order=own["kind"].map(order)).sort_values(["order", "runtime_ms"])
        columns: list[Column] = [
            ("kind", "`{kind}`"),
            ("method", "{title}"),
            ("ms", "{runtime_ms:.2f}"),
            ("× matmul", "{gemms:.2f}"),
            ("peak, MiB", "{op_mem_mb:,.0f}"),
            *errors,
            _multiple("e"),
            _multiple("c"),
        ]
        parts.append(f"{head}\n\n{table(own, columns)}")
    where = dict.fromkeys(rows["where"])
    return "\n".join([*parts, *(f"{text}.\n" for text in where)])


def logprobs(kept: Measurements) -> str:
    """Log-probabilities of every method, but of kinds that other packages were timed on too."""
    rows = rows_of(kept, "logprobs")
    if rows.empty:
        return ""
    others = rows[~rows["method"].isin(["cce", "cce_exact", "chunked"])]
    pairs = set(zip(others["test_data"], others["kind"], strict=True))
    shared = [pair in pairs for pair in zip(rows["test_data"], rows["kind"], strict=True)]
    errors: list[Column] = [
        ("log-probability", "{error_logprobs:.1e}"),
        ("entropy", "{error_entropy:.1e}"),
    ]
    return _by_kind(rows[shared], errors)


def additions(kept: Measurements) -> str:
    """Return what temperature, ranks, candidates and entropies cost, in products."""
    rows = rows_of(kept, "logprobs")
    if rows.empty:
        return ""
    rows = rows[rows["method"] == "cce"]
    rows = rows.assign(
        part=[parse(kind).part for kind in rows["kind"]],
        asked=[
            ", ".join(["log-probability", *kind.split("+")[1:]]).replace("log-probability, ", "")
            for kind in rows["kind"]
        ],
    )
    lines = []
    for (data, asked), own in rows.groupby(["test_data", "asked"], sort=False):
        found = own.drop_duplicates("part", keep="last").set_index("part")["gemms"]
        line = {"data": data_title(str(data)), "asked": asked}
        lines.append({**line, "fw": found.get("fw"), "both": found.get("fw-bw")})
    return table(
        [line for line in lines if line["fw"] is not None or line["both"] is not None],
        [
            ("data", "{data}"),
            ("asked for", "{asked}"),
            ("forward, × matmul", "{fw:.2f}"),
            ("forward and backward", "{both:.2f}"),
        ],
    )


def divergences(kept: Measurements) -> str:
    """Divergences of every method."""
    rows = rows_of(kept, "divergence")
    if rows.empty:
        return ""
    errors: list[Column] = [
        ("divergence", "{error_divergence:.1e}"),
        ("mean", "{loss_error:.1e}"),
    ]
    return _by_kind(rows, errors)


BLOCKS = {"logprobs": logprobs, "additions": additions, "divergences": divergences}


def read(folder: Path) -> Records:
    """Read the records of TRL's trainers in a folder."""
    return {
        name: [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob(f"{name}_*.json"))
            if name.endswith("bf16") or "bf16" not in path.name
        ]
        for name in TRAINERS
    }


def section(name: str, records: Records) -> str:
    """Return the block of one experiment, ``"grpo"`` or ``"dpo"``, in float32 and bfloat16."""
    texts = [_trainer(record) for each in (name, f"{name}_bf16") for record in records[each]]
    return "\n\n".join(texts)


def _trainer(record: Mapping[str, Any]) -> str:
    machine, settings = record["machine"], dict(record["settings"])
    precision = "bfloat16 autocast" if settings.pop("bf16") else "float32"
    versions = ", ".join(f"{name} {x}" for name, x in machine["versions"].items() if x)
    command = without_paths(machine["command"])
    said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items())
    head = (
        f"**{precision}**: {machine['device']}, {versions}; commit {machine['commit'][:12]}, "
        f"{machine['date']}, `python -m experiments.{command}`. Settings: {said}."
    )
    sections = dict.fromkeys(name for run in record["runs"] for name in run["ms_per_step"])
    figure = "reward" if "grpo" in record["experiment"] else "rewards/margins"
    lines = [
        {
            "layer": LAYERS[run["method"]],
            "seed": run["seed"],
            "last": _last(run["logs"], figure),
            "loss": _last(run["logs"], "loss"),
            **{f"ms {key}": value for key, value in run["ms_per_step"].items()},
            **{f"mib {key}": value for key, value in run["peak_mib"].items()},
        }
        for run in record["runs"]
    ]
    times: list[Column] = [(f"{key}, ms / peak MiB", _time_and_peak(key)) for key in (*sections,)]
    columns: list[Column] = [
        ("output layer", "{layer}"),
        ("seed", "{seed}"),
        (f"`{figure}`, last {LAST_STEPS} steps", "{last:.4f}"),
        ("`loss`", "{loss:.5f}"),
        *times,
    ]
    parts = [head, table(lines, columns)]
    far = [
        {**line, "layer": LAYERS[line["method"]], "steps": settings["steps"]}
        for line in record.get("distances", [])
    ]
    names = [
        key
        for key in dict.fromkeys(key for line in far for key in line)
        if key not in ("method", "seed", "layer", "steps", "equal_steps")
    ]
    if far:
        shown: list[Column] = [
            (f"`{key}`", lambda row, key=key: f"{row[key]:.1e}" if key in row else "")
            for key in names
        ]
        parts += [
            "Largest distance from the run with TRL's output layer, over all steps:",
            table(
                far,
                [
                    ("output layer", "{layer}"),
                    ("seed", "{seed}"),
                    *shown,
                    ("equal from the start", "{equal_steps} of {steps} steps"),
                ],
            ),
        ]
    return "\n\n".join(part.strip("\n") for part in parts)


def _last(logs: Sequence[Mapping[str, float]], name: str) -> float | None:
    found = [entry[name] for entry in logs[-LAST_STEPS:] if name in entry]
    return sum(found) / len(found) if found else None


def _time_and_peak(section_name: str) -> Any:
    def show(row: Row) -> str:
        peak = cell(row, f"{{mib {section_name}:,.0f}}")
        time = cell(row, f"{{ms {section_name}:.1f}}")
        return f"{time} / {peak}" if peak else time

    return show
