"""Tables of docs/evidence.md. Each line names its record and the commit that was measured."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from docs.benchmark_runs import BOTH, COMPARED, MULTIPLES, Measurements, data_title
from docs.page import Column, table, without_paths
from docs.training_runs import (
    EARLIER,
    FULL,
    HELD_OUT,
    RAREST,
    Record,
    Records,
    differences,
    mean_and_error,
)

HEADS = ("gemma2-structured", "smollm2")
"""Problems of the table of the output layer."""

FOLDER = "measurements"
NOISE = 1.02
"""Times, peaks and errors that are above another by less than this factor are not worse."""

TRAINERS = {"grpo": "GRPO", "grpo_bf16": "GRPO, bf16", "dpo": "DPO", "dpo_bf16": "DPO, bf16"}
"""Experiments with TRL's trainers, by the names of their records."""


def link(path: str, commit: str) -> str:
    """Return a link to a record below ``docs/measurements``, with the commit measured."""
    return f"[{path}]({FOLDER}/{path}), {commit}"


def link_run(record: Record) -> str:
    """Return a link to the record of a training experiment."""
    return link(f"experiments/{record.name}.json", record.content["machine"]["commit"])


def commands(found: Iterable[str]) -> str:
    """Return a line with the commands of records, each once; "" without any."""
    text = "`, `".join(dict.fromkeys(map(without_paths, found)))
    return text and f"\nFrom `{text}`.\n"


def layer(kept: Measurements, _: Records, __: Path) -> str:
    """Time, memory and error of loss and gradients by each method."""
    rows = kept.of(kind=BOTH)
    rows = rows[rows["test_data"].isin(HEADS) & rows["method"].isin(list(COMPARED))]
    lines = [
        {**row, "name": COMPARED[row["method"]].format(version=row["version"]),
         "head": data_title(row["test_data"]),
         "record": link(row["source"], kept.files[row["source"]]["environment"]["commit"])}
        for row in rows.sort_values(["test_data", "runtime_ms"]).to_dict("records")
    ]  # fmt: skip
    text = table(
        lines,
        [("head", "{head}"), ("loss and both gradients", "{name}"), ("ms", "{runtime_ms:.1f}"),
         ("× matmul", "{gemms:.2f}"), ("peak, MiB", "{op_mem_mb:,.0f}"),
         ("error of dE / dC, × bf16 rounding", MULTIPLES), ("record", "{record}")],
    )  # fmt: skip
    return text and text + commands(kept.files[source]["command"] for source in rows["source"])


def finetune(_: Measurements, runs: Records, __: Path) -> str:
    """Held-out loss minus that of full logits, speed and memory of fine-tuned models."""
    lines = []
    for record in runs["finetune"]:
        largest = {row["method"]: row["tokens"] for row in record.content.get("largest", [])}
        for method in dict.fromkeys(record.runs["method"]):
            own = record.runs[record.runs["method"] == method]
            found = differences(record.runs, method)[HELD_OUT]
            lines.append(
                {"model": f"{record.model}, {record.device}", "method": method, "seeds": len(own),
                 "difference": "" if method == FULL else mean_and_error(found),
                 "most": None if method == FULL else found.abs().max(),
                 "speed": 1e3 * record.tokens / own["ms_per_step"].median(),
                 "mib": own["peak_mib"].max(), "largest": largest.get(method),
                 "record": link_run(record)}
            )  # fmt: skip
    columns: list[Column] = [
        ("model", "{model}"), ("method", "`{method}`"), ("seeds", "{seeds}"),
        ("held-out loss minus full logits", "{difference}"), ("largest of a seed", "{most:.4f}"),
        ("tokens/s, whole step", "{speed:,.0f}"), ("peak, MiB", "{mib:,.0f}"),
        ("largest batch, tokens", "{largest:,.0f}"), ("record", "{record}"),
    ]  # fmt: skip
    return table(lines, columns) + _commands(runs["finetune"])


def _commands(records: Iterable[Record]) -> str:
    return commands(f"python -m experiments.{x.content['machine']['command']}" for x in records)


def pretrain(_: Measurements, runs: Records, __: Path) -> str:
    """Held-out loss by rarity of the token, minus that of full logits."""
    lines = []
    records = [*runs["pretrain"], *runs[f"{EARLIER}/pretrain"]]
    for record in records:
        for method in dict.fromkeys(record.runs["method"]):
            found = differences(record.runs, method)
            if method != FULL and len(found):
                lines.append(
                    {"device": record.device, "method": method, "seeds": len(found),
                     **{name: mean_and_error(found[name]) for name in found},
                     "record": link_run(record)}
                )  # fmt: skip
    if not lines:
        return ""
    rare = [name for name in lines[0] if name.startswith("seen ")]
    return table(
        lines,
        [("device", "{device}"), ("method", "`{method}`"), ("seeds", "{seeds}"),
         (HELD_OUT, f"{{{HELD_OUT}}}"), *((name, f"{{{name}}}") for name in rare[:2]),
         (RAREST, f"{{{RAREST}}}"), ("record", "{record}")],
    ) + _commands(records)  # fmt: skip


def trainers(_: Measurements, __: Records, folder: Path) -> str:
    """TRL's trainers with their own output layer, with ours, and with theirs in another order."""
    lines, found = [], []
    records = {path: json.loads(path.read_text("utf-8")) for path in folder.glob("*/*_*.json")}
    for name, title in TRAINERS.items():
        for path in sorted(x for x in records if records[x].get("experiment") == name):
            record = records[path]
            found.append(f"python -m experiments.{record['machine']['command']}")
            away = {(line["method"], line["seed"]): line for line in record.get("distances", [])}
            for run in record["runs"]:
                off = away.get((run["method"], run["seed"]), {})
                figures = {k: v for k, v in off.items() if isinstance(v, float)}
                lines.append(
                    {"trainer": f"{title}, {record['machine']['device']}", **run,
                     "off": ", ".join(f"{k} {v:.1e}" for k, v in figures.items()),
                     "equal": f"{off['equal_steps']} of {len(run['logs'])}" if off else "",
                     "ms": ", ".join(f"{k} {v:.0f}" for k, v in run["ms_per_step"].items()),
                     "mib": ", ".join(f"{k} {v:,.0f}" for k, v in run["peak_mib"].items()),
                     "record": link(f"experiments/{path.name}", record["machine"]["commit"])}
                )  # fmt: skip
    text = table(
        lines,
        [("trainer", "{trainer}"), ("output layer", "`{method}`"), ("seed", "{seed}"),
         ("largest difference from TRL's", "{off}"), ("steps that agree to 0.1 %", "{equal}"),
         ("ms a step", "{ms}"), ("peak, MiB", "{mib}"), ("record", "{record}")],
    )  # fmt: skip
    return text and text + commands(found)


def gpus(kept: Measurements, _: Records, __: Path) -> str:
    """Vocabulary-parallel loss and gradients, next to tensor-parallel full logits."""
    lines = []
    for source, record in kept.files.items():
        if record.get("part") != "distributed" or record["processes"] == 1:
            continue
        rows = pd.DataFrame(record["rows"])
        for (head, tokens), own in rows.groupby(["data", "tokens"], sort=False):
            logits = own[own["setup"] == "tensor-parallel full logits"]
            ours = own[(own["setup"] == "vocabulary-parallel") & (own["impl"] == "cce")]
            if logits.empty or ours.empty:
                continue
            ours, theirs = ours.iloc[0], logits.iloc[0]
            lines.append(
                {"head": head, "tokens": tokens, "processes": record["processes"],
                 "device": record["environment"]["device"],
                 "ms": ours["ms"], "mib": ours["peak_mib"], "their_ms": theirs["ms"],
                 "their_mib": theirs["peak_mib"],
                 "record": link(source, record["environment"]["commit"])}
            )  # fmt: skip
    text = table(
        lines,
        [("head", "{head}"), ("GPUs", "{processes} x {device}"), ("tokens", "{tokens:,}"),
         ("`cce`, ms", "{ms:.1f}"), ("peak, MiB", "{mib:,.0f}"),
         ("full logits, ms", "{their_ms:.1f}"), ("peak, MiB", "{their_mib:,.0f}"),
         ("record", "{record}")],
    )  # fmt: skip
    return text and text + commands(["torchrun --nproc-per-node R -m benchmark.distributed"])


def against(kept: Measurements, runs: Records, _: Path) -> str:
    """Lines of everything in the records in which full logits or another package is better."""
    lines = []
    rows = kept.of(kind=BOTH)
    for name, own in rows.groupby("test_data", sort=False):
        by_method = own.set_index("method")
        if "cce" not in by_method.index:
            continue
        for method in (m for m in by_method.index if m in COMPARED and not m.startswith("cce")):
            ours, theirs = by_method.loc["cce"], by_method.loc[method]
            where = f"{data_title(name)}, {kept.devices[0]}"
            title = COMPARED[method].format(version=theirs["version"])
            for what, column, form in (
                ("time, ms", "runtime_ms", ".1f"), ("peak, MiB", "op_mem_mb", ",.0f"),
                ("error of dE, × rounding", "multiple_e", ".2f"),
                ("error of dC, × rounding", "multiple_c", ".2f"),
            ):  # fmt: skip
                if ours[column] > NOISE * theirs[column]:
                    lines.append(
                        {"where": where, "what": what, "ours": f"{ours[column]:{form}}",
                         "theirs": f"{theirs[column]:{form}}", "title": title,
                         "record": link(
                             ours["source"], kept.files[ours["source"]]["environment"]["commit"]
                         )}
                    )  # fmt: skip
    for record in (*runs["finetune"], *runs["pretrain"]):
        lines += _worse_runs(record)
    return table(
        lines,
        [("where", "{where}"), ("figure", "{what}"), ("`cce`", "{ours}"), ("better", "{theirs}"),
         ("by", "{title}"), ("record", "{record}")],
    )  # fmt: skip


def _worse_runs(record: Record) -> list[dict[str, Any]]:
    """Return lines of a training record: slower than full logits, or a loss that is higher by more
    than two standard errors of the seeds.
    """
    runs, lines = record.runs, []
    if not {FULL, "cce"} <= set(runs["method"]):
        return []
    where = "Pretraining" if record.name.startswith("pretrain") else f"Fine-tuning {record.model}"
    shared = {"where": f"{where}, {record.device}", "title": "full logits",
              "record": link_run(record)}  # fmt: skip
    ms = runs.groupby("method", sort=False)["ms_per_step"].median()
    if ms["cce"] > NOISE * ms[FULL]:
        lines.append({**shared, "what": "ms a step", "ours": f"{ms['cce']:.1f}",
                      "theirs": f"{ms[FULL]:.1f}"})  # fmt: skip
    found = differences(runs, "cce")
    for name in found:
        values = found[name].dropna()
        worse = -values if name.startswith("probability") else values
        if len(values) > 1 and worse.mean() > 2 * worse.sem():
            lines.append({**shared, "what": f"{name}, difference of {len(values)} seeds",
                          "ours": mean_and_error(values), "theirs": "0"})  # fmt: skip
    return lines


WANTED: Mapping[str, tuple[str, str]] = {
    "Fine-tuning Gemma 3 270M, whose vocabulary has 262,144 classes": (
        "experiments/finetune_gemma3-270m_*.json", "python -m experiments.finetune"),
    "GRPO through TRL, with the adapter and without": (
        "experiments/grpo_*.json", "python -m experiments.grpo"),
    "DPO through TRL, with the adapter and without": (
        "experiments/dpo_*.json", "python -m experiments.dpo"),
    "Eight GPUs of one host": ("*/distributed_8.json", "python -m benchmark.distributed"),
    "Distillation of one real model into a smaller one": (
        "experiments/distill_*.json", "python -m examples.distill"),
    "LoRA on the head, frozen head, QLoRA": (
        "experiments/lora_*.json", "python training/train.py --lora"),
}  # fmt: skip
"""What belongs on the page: a pattern of its records, and the command that measures it."""


def missing(_: Measurements, __: Records, folder: Path) -> str:
    """Name the experiments that have no record below ``folder``."""
    return "\n".join(
        f"- {name}: not measured yet (`{command}`)."
        for name, (pattern, command) in WANTED.items()
        if not any(folder.glob(pattern))
    )


BLOCKS: dict[str, Callable[[Measurements, Records, Path], str]] = {
    "evidence-layer": layer,
    "evidence-finetune": finetune,
    "evidence-pretrain": pretrain,
    "evidence-trainers": trainers,
    "evidence-gpus": gpus,
    "evidence-against": against,
    "evidence-missing": missing,
}
