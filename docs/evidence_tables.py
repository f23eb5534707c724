"""Tables of docs/evidence.md. Each line names its record and the commit that was measured."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from cut_cross_entropy.benchmark.shapes import SHAPES
from docs import post_training_runs
from docs.benchmark_runs import BOTH, COMPARED, MULTIPLES, Measurements, data_title, headline_rows
from docs.page import Column, table, without_paths
from docs.plots import short
from docs.training_runs import (
    EARLIER,
    FULL,
    HELD_OUT,
    RAREST,
    REORDERED,
    TUNED,
    Record,
    Records,
    costs,
    differences,
    mean_and_error,
)

RIVALS = {FULL: "full logits", "torch_compile": "full logits, `torch.compile`",
          "apple": "Apple's package", "liger": "Liger", "trl": "TRL's function"}  # fmt: skip
"""Methods of training that `cce` is held against."""

OURS = ("cce", "cce_exact", "chunked")
"""Methods of a benchmark that are this package's."""

SUMMARISED = {"cce": ("", FULL), "cce_fsdp2": (", FSDP2", "full_fsdp2"),
              "cce_vocab_parallel": (", rows of the head divided", "full_fsdp2")}  # fmt: skip
"""Methods of training in the summary, with their way and the full logits whose costs are next."""

JUDGED = {HELD_OUT: "", "seen never": ", targets never seen"}
"""Losses in the summary, as its jobs end."""

DIVIDED = ("Gemma 2 2B", 8192, 2)
"""Head, tokens and GPUs of a divided output layer in the summary."""

FOLDER = "measurements"
POOLED = "pooled"
APART = 1000
"""What seeds of another record differ by where records are pooled."""

EQUAL, ORDER, ABOVE = "equal", "order", "above"
"""Where the losses of a training end."""

NOISE = 1.02
"""Times, peaks and errors that differ by less than this factor count as equal."""

COSTS = (("time, ms", "runtime_ms", ".1f"), ("peak, MiB", "op_mem_mb", ",.0f"),
         ("error of dE, × rounding", "multiple_e", ".2f"),
         ("error of dC, × rounding", "multiple_c", ".2f"),
         ("largest error of a log-probability", "error_logprobs", ".1e"),
         ("largest error of an entropy", "error_entropy", ".1e"),
         ("largest error of a divergence", "error_divergence", ".1e"))  # fmt: skip
"""Figures in which one method of a benchmark may be worse than another: title, column, format."""

TRAINERS = {"grpo": "GRPO", "grpo_bf16": "GRPO, bf16", "dpo": "DPO", "dpo_bf16": "DPO, bf16"}
"""Experiments with TRL's trainers, by the names of their records."""

FIGURES = ("loss", "reward", "rewards/margins")
"""Logged values of the trainers that the page compares."""


def link(path: str, commit: str) -> str:
    """Return a link to a record below ``docs/measurements``, with the commit measured."""
    return f"[{path}]({FOLDER}/{path}), {commit}"


def link_run(record: Record) -> str:
    """Return a link to the record of a training experiment, or to those that were pooled."""
    return " and ".join(
        link(f"experiments/{name}.json", commit)
        for name, commit in record.content.get(
            POOLED, [(record.name, record.content["machine"]["commit"])]
        )
    )


def pooled(records: Iterable[Record]) -> list[Record]:
    """Put records of one kind of device with the same settings together, of several texts too.

    Seeds of another record count as others: its runs are compared with its own full logits.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        key = record.device + json.dumps(record.content["settings"], sort_keys=True)
        groups.setdefault(key, []).append(record)
    found = []
    for group in groups.values():
        runs = [one.runs.assign(seed=one.runs["seed"] + i * APART) for i, one in enumerate(group)]
        names = [(one.name, one.content["machine"]["commit"]) for one in group]
        content = {**group[0].content, POOLED: names}
        whole = replace(group[0], content=content, runs=pd.concat(runs, ignore_index=True))
        found.append(whole if len(group) > 1 else group[0])
    return found


def commands(found: Iterable[str]) -> str:
    """Return a line with the commands of records, each once; "" without any."""
    text = "`, `".join(dict.fromkeys(map(without_paths, found)))
    return text and f"\nFrom `{text}`.\n"


def jobs(kept: Measurements, runs: Records, folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the summary; those of trainings have ``place``, see :func:`place_of`."""
    lines = [*_layers_in_short(kept), *_gpus_in_short(kept)]
    for name in (*TUNED, "pretrain"):
        for record in pooled(runs[name]):
            lines += _training_in_short(name, record)
    for title, path, record in _trl_records(folder):
        lines += _trainer_in_short(title, path, record)
    return lines


def verdict(kept: Measurements, runs: Records, folder: Path) -> str:
    """Count the jobs in which a loss, memory or time is better, and name the commits measured."""
    lines = jobs(kept, runs, folder)
    if not lines:
        return ""
    trained = [line for line in lines if "place" in line]
    higher = {
        place: "".join(f"\n    - {end}: {x['job']} ({x['loss']})" for x in trained
                       if x["place"] == place)
        for place, end in ((ORDER, "within"), (ABOVE, "beyond"))
    }  # fmt: skip
    commits: dict[str, int] = {}
    for line in lines:
        for commit in dict.fromkeys(re.findall(r"\), ([0-9a-f]{7,})", line["record"])):
            commits[commit] = commits.get(commit, 0) + 1
    count = sum(line["place"] == EQUAL for line in trained)
    return (
        f"- Losses: in {count} of the {len(trained)} lines of training below `cce` ends at most "
        "two standard errors above full logits, with one seed no higher. Pretraining has two, "
        "over all tokens and over targets never seen."
        + " The others end higher, in each seed within what reversed batches do to full logits, or "
        "beyond:"
        * (count < len(trained))
        + higher[ORDER]
        + higher[ABOVE]
        + _compared("Peak memory", "mib", lines)
        + _compared("Time", "ms", lines)
        + "\n- Commits measured, with their lines: "
        + ", ".join(f"{commit} ({n})" for commit, n in sorted(commits.items(), key=lambda x: -x[1]))
        + "."
    )


def _compared(title: str, cost: str, lines: Iterable[Mapping[str, Any]]) -> str:
    """Count the jobs in which a cost is less than with full logits or more; "" without any."""
    found = [
        (line[cost] / line[f"full_{cost}"], cost != "ms" or line.get("apart", True))
        for line in lines
        if not pd.isna(line[cost])
    ]
    if not found:
        return ""
    ratios = [ratio for ratio, _ in found]
    return (
        f"\n- {title}: less than full logits in {sum(x < 1 / NOISE and y for x, y in found)} of "
        f"{len(found)} lines, more in {sum(x > NOISE and y for x, y in found)} (differences up to "
        f"{NOISE - 1:.0%} count as none, as do times that overlap between the seeds); between "
        f"{min(ratios):.2f} and {max(ratios):.2f} times theirs, {statistics.median(ratios):.2f} in "
        "the median."
    )


def summary(kept: Measurements, runs: Records, folder: Path) -> str:
    """A line for each job: `cce` next to full logits, and what another order of sums does."""
    return table(
        jobs(kept, runs, folder),
        [("job", "{job}"), ("loss minus full logits", "{loss}"),
         ("full logits reordered", "{noise}"),
         ("ms, ours / full logits", "{ms:.1f} / {full_ms:.1f}"),
         ("peak MiB, ours / full logits", "{mib:,.0f} / {full_mib:,.0f}"),
         ("record", "{record}")],
    )  # fmt: skip


def _layers_in_short(kept: Measurements) -> Iterator[dict[str, Any]]:
    for head, rows in headline_rows(kept).groupby("test_data", sort=False):
        found = rows.set_index("method")
        if {"cce", "torch_compile"} <= set(found.index):
            ours, full = found.loc["cce"], found.loc["torch_compile"]
            where = kept.files[ours["source"]]["environment"]
            errors = f"dE {ours['multiple_e']:.1f} × rounding, theirs {full['multiple_e']:.1f}"
            yield {
                "job": f"output layer of {data_title(head)}; {short(where['device'])}",
                "loss": "" if math.isnan(ours["multiple_e"]) else errors,
                "noise": "", "ms": ours["runtime_ms"], "full_ms": full["runtime_ms"],
                "mib": ours["op_mem_mb"], "full_mib": full["op_mem_mb"],
                "record": link(ours["source"], where["commit"]),
            }  # fmt: skip


def _gpus_in_short(kept: Measurements) -> Iterator[dict[str, Any]]:
    for line in _gpu_lines(kept):
        if (line["head"], line["tokens"], line["processes"]) == DIVIDED:
            yield {
                "job": f"output layer of {line['head']} divided over {line['processes']} x "
                f"{short(line['device'])}", "loss": "", "noise": "",
                "ms": line["ms"], "full_ms": line["their_ms"],
                "mib": line["mib"], "full_mib": line["their_mib"], "record": line["record"],
            }  # fmt: skip


def _training_in_short(name: str, record: Record) -> Iterator[dict[str, Any]]:
    known = set(record.runs["method"])
    cost = costs(record.runs)
    title = f"{TUNED[name]} {record.model}" if name in TUNED else "Pretraining from scratch"
    found = {m: differences(record.runs, m) for m in known & {*SUMMARISED, REORDERED}}
    for method, (way, rival) in SUMMARISED.items():
        if name == "several_gpus" and not way:  # on one of them
            continue
        full = rival if rival in known else FULL
        for figure, what in JUDGED.items():
            if method not in found or figure not in found[method]:
                continue
            yield {
                "job": f"{title}{way}{what}; {short(record.device)}",
                "loss": of_seeds(found[method][figure]),
                "place": place_of(
                    found[method][figure],
                    found[REORDERED][figure] if REORDERED in found else pd.Series(dtype=float),
                ),
                "noise": of_seeds(found[REORDERED][figure]) if REORDERED in found else "",
                "ms": cost.loc[method, "ms_per_step"], "full_ms": cost.loc[full, "ms_per_step"],
                "apart": apart(record.runs, method, full),
                "mib": cost.loc[method, "peak_mib"], "full_mib": cost.loc[full, "peak_mib"],
                "record": link_run(record),
            }  # fmt: skip


def apart(runs: pd.DataFrame, method: str, other: str) -> bool:
    """Whether each run of one method takes longer a step than each of the other."""
    one, two = (runs.loc[runs["method"] == name, "ms_per_step"] for name in (method, other))
    return bool(one.min() > two.max() or one.max() < two.min())


def place_of(values: pd.Series, reordered: pd.Series) -> str:
    """Return where losses end: at most two standard errors above full logits, or within what
    another order of the sums does to a seed, or above that.

    Args:
        values: differences from full logits of the same seed, in nats.
        reordered: of the same with another order of the sums.
    """
    values = values.dropna()
    if float(values.mean()) <= (0.0 if len(values) < 2 else 2 * float(values.sem())):
        return EQUAL
    moved = float(reordered.abs().max()) if reordered.notna().any() else 0.0
    return ORDER if float(values.max()) <= moved else ABOVE


def of_seeds(values: pd.Series) -> str:
    """Format differences of several seeds: mean, standard error and the largest."""
    values = values.dropna()
    if len(values) < 2:
        return mean_and_error(values)
    return f"{mean_and_error(values)}, at most {values.abs().max():.4f} ({len(values)} seeds)"


def _trainer_in_short(title: str, path: Path, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    off: dict[str, float] = {}
    for line in record.get("distances", []):
        off[line["method"]] = max(line["loss"], off.get(line["method"], 0.0))
    cost = costs(_trainer_runs(record))
    if {"trl", "token_logprobs"} <= set(cost.index) and "token_logprobs" in off:
        ours, theirs = cost.loc["token_logprobs"], cost.loc["trl"]
        where = record["machine"]
        yield {
            "job": f"{title} by TRL, its output layer in place of full logits; "
            f"{short(where['device'])}",
            "loss": f"at most {off['token_logprobs']:.1e}",
            "noise": f"at most {off['trl_reordered']:.1e}" if "trl_reordered" in off else "",
            "ms": ours["ms_per_step"], "full_ms": theirs["ms_per_step"],
            "apart": apart(_trainer_runs(record), "token_logprobs", "trl"),
            "mib": ours["peak_mib"], "full_mib": theirs["peak_mib"],
            "record": link(f"experiments/{path.name}", where["commit"]),
        }  # fmt: skip


def _trainer_runs(record: Mapping[str, Any]) -> pd.DataFrame:
    """Return what a step costs in each run: the time of all its parts, the highest peak."""
    rows = [
        {"method": run["method"], "ms_per_step": sum(run["ms_per_step"].values()),
         "peak_mib": max(run["peak_mib"].values())}
        for run in record["runs"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def layer(kept: Measurements, _: Records, __: Path) -> str:
    """Time, memory and error of loss and gradients by each method."""
    rows = headline_rows(kept)
    rows = rows[rows["method"].isin(list(COMPARED))]
    lines = [
        {**row, "name": COMPARED[row["method"]].format(version=row["version"]),
         "head": data_title(row["test_data"]),
         "record": link(row["source"], kept.files[row["source"]]["environment"]["commit"])}
        for row in rows.sort_values("runtime_ms").sort_values(
            "test_data", kind="stable", ascending=False).to_dict("records")
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
    return _trained(runs["finetune"])


def distill(_: Measurements, runs: Records, __: Path) -> str:
    """Held-out divergence minus that of full logits, speed and memory of distillation."""
    return _trained(runs["distill"])


def _trained(records: Iterable[Record]) -> str:
    """Return the table of the methods of some records."""
    lines, largest = [], dict[tuple[str, str], tuple[int, str]]()
    for record in records:
        for row in record.content.get("largest", []):
            where = row.get("commit", record.content["machine"]["commit"])
            largest.setdefault((record.model, row["method"]), (row["tokens"], where))
    for record in records:
        cost, commit = costs(record.runs), record.content["machine"]["commit"]
        for method in cost.index:
            own = record.runs[record.runs["method"] == method]
            found = differences(record.runs, method)[HELD_OUT]
            tokens, measured = largest.get((record.model, method), (None, commit))
            where = {record.name: record}
            if record.lender is not None and method in set(record.runs[-record.lent :]["method"]):
                where[record.lender.name] = record.lender
            lines.append(
                {"model": f"{record.model}, {record.device}", "method": method, "seeds": len(own),
                 "difference": "" if method == FULL else mean_and_error(found),
                 "most": None if method == FULL else found.abs().max(),
                 "speed": 1e3 * record.tokens / cost.loc[method, "ms_per_step"],
                 "mib": cost.loc[method, "peak_mib"], "tokens": tokens,
                 "other": "" if measured == commit else f" ({measured})",
                 "record": " and ".join(map(link_run, where.values()))}
            )  # fmt: skip
    columns: list[Column] = [
        ("model", "{model}"), ("method", "`{method}`"), ("seeds", "{seeds}"),
        ("held-out loss minus full logits", "{difference}"), ("largest of a seed", "{most:.4f}"),
        ("tokens/s, whole step", "{speed:,.0f}"), ("peak, MiB", "{mib:,.0f}"),
        ("largest batch, tokens", "{tokens:,}{other}"), ("record", "{record}"),
    ]  # fmt: skip
    return table(lines, columns) + _commands(records)


def _commands(records: Iterable[Record]) -> str:
    found = []
    for record in records:
        processes = record.content["settings"].get("processes")
        start = f"torchrun --nproc-per-node {processes}" if processes else "python"
        found.append(f"{start} -m experiments.{record.content['machine']['command']}")
    return commands(found)


def several_gpus(_: Measurements, runs: Records, __: Path) -> str:
    """Held-out loss, speed and memory of training on several GPUs and on one."""
    return _trained(runs["several_gpus"])


def pretrain(_: Measurements, runs: Records, __: Path) -> str:
    """Held-out loss by rarity of the token, minus that of full logits."""
    lines = []
    records = [*runs["pretrain"], *runs[EARLIER]]
    for record in (*pooled(runs["pretrain"]), *runs[EARLIER]):
        known = dict.fromkeys(record.runs["method"])
        pairs = [(f"`{method}`", method, FULL) for method in known if method != FULL]
        if {"cce", "cce_exact"} <= set(known):  # the filter alone
            pairs.append(("`cce` minus `cce_exact`", "cce", "cce_exact"))
        for title, *pair in pairs:
            found = differences(record.runs, *pair)
            if len(found):
                lines.append(
                    {"device": record.device, "title": title, "seeds": len(found),
                     "steps": record.content["settings"]["steps"],
                     "width": record.content["settings"]["width"],
                     **{name: mean_and_error(found[name]) for name in found},
                     "record": link_run(record)}
                )  # fmt: skip
    if not lines:
        return ""
    rare = [name for name in lines[0] if name.startswith("seen ")]
    return table(
        lines,
        [("device", "{device}"), ("features", "{width:,}"), ("steps", "{steps:,}"),
         ("method", "{title}"), ("seeds", "{seeds}"),
         *((name, f"{{{name}}}") for name in (HELD_OUT, *rare[:2], RAREST)),
         ("record", "{record}")],
    ) + _commands(records)  # fmt: skip


def _trl_records(folder: Path) -> list[tuple[str, Path, dict[str, Any]]]:
    """Return title, path and content of the records of TRL's trainers."""
    found = {path: json.loads(path.read_text("utf-8")) for path in folder.glob("*/*_*.json")}
    return [
        (title, path, found[path])
        for name, title in TRAINERS.items()
        for path in sorted(path for path in found if found[path].get("experiment") == name)
    ]


def trainers(_: Measurements, __: Records, folder: Path) -> str:
    """TRL's trainers with their own output layer, with ours, and with theirs in another order."""
    lines, found = [], []
    for title, path, record in _trl_records(folder):
        found.append(f"python -m experiments.{record['machine']['command']}")
        away = {(line["method"], line["seed"]): line for line in record.get("distances", [])}
        for run in record["runs"]:
            off = away.get((run["method"], run["seed"]), {})
            figures = {name: off[name] for name in FIGURES if name in off}
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
    text = table(
        _gpu_lines(kept),
        [("head", "{head}"), ("GPUs", "{processes} x {device}"), ("tokens", "{tokens:,}"),
         ("`cce`, ms", "{ms:.1f}"), ("peak, MiB", "{mib:,.0f}"),
         ("full logits, ms", "{their_ms:.1f}"), ("peak, MiB", "{their_mib:,.0f}"),
         ("record", "{record}")],
    )  # fmt: skip
    return text and text + commands(["torchrun --nproc-per-node R -m benchmark.distributed"])


def _gpu_lines(kept: Measurements) -> Iterator[dict[str, Any]]:
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
            yield {
                "head": SHAPES[head].title, "tokens": tokens, "processes": record["processes"],
                "device": record["environment"]["device"],
                "ms": ours["ms"], "mib": ours["peak_mib"], "their_ms": theirs["ms"],
                "their_mib": theirs["peak_mib"],
                "record": link(source, record["environment"]["commit"]),
            }  # fmt: skip


def against(kept: Measurements, runs: Records, folder: Path) -> str:
    """Lines of everything in the records in which full logits or another package is better."""
    lines = []
    rows = kept.of(kind=BOTH)
    measured = [rows[rows["part"] != "comparison"]]
    measured += [
        kept.of(device, part="comparison", kind=BOTH)
        for device in {one["environment"]["device"]: None for one in kept.parts("comparison")}
    ]
    for rows in measured:
        for (name, device), own in rows.groupby(["test_data", "device"], sort=False):
            lines += _worse_layers(kept, own, f"{data_title(name)}, {device}", COMPARED)
    for subject in ("logprobs", "divergence"):
        rows = post_training_runs.rows_of(kept, subject)
        groups = () if rows.empty else rows.groupby(["test_data", "kind", "device"], sort=False)
        for (name, kind, device), own in groups:
            own = own.assign(
                **{f"multiple_{x}": own[f"error_{x}"] / own[f"rounding_{x}"] for x in "ec"}
            )
            others = dict(zip(own["method"], own["title"], strict=True))
            lines += _worse_layers(kept, own, f"{data_title(name)}, `{kind}`, {device}", others)
    tuned = (one for name in TUNED for one in runs[name])
    for record in (*tuned, *pooled(runs["pretrain"])):
        lines += _worse_runs(record)
    for title, path, record in _trl_records(folder):
        found = _trainer_runs(record)
        ms = costs(found)["ms_per_step"]
        ours, theirs = ms.get("token_logprobs", 0.0), ms.get("trl", math.inf)
        if ours > NOISE * theirs and apart(found, "token_logprobs", "trl"):
            lines.append(
                {"where": f"{title}, {record['machine']['device']}", "what": "ms a step",
                 "ours": f"{ours:.0f}", "theirs": f"{theirs:.0f}", "title": "TRL's output layer",
                 "record": link(f"experiments/{path.name}", record["machine"]["commit"])}
            )  # fmt: skip
    return table(
        lines,
        [("where", "{where}"), ("figure", "{what}"), ("ours", "{ours}"), ("better", "{theirs}"),
         ("by", "{title}"), ("record", "{record}")],
    )  # fmt: skip


def _worse_layers(
    kept: Measurements, rows: pd.DataFrame, where: str, titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return lines of a problem's rows, one a method, for costs of `cce` above another's."""
    by_method = rows.set_index("method")
    if "cce" not in by_method.index:
        return []
    ours = by_method.loc["cce"]
    record = link(ours["source"], kept.files[ours["source"]]["environment"]["commit"])
    lines = []
    for method in (m for m in by_method.index if m in titles and m not in OURS):
        theirs = by_method.loc[method]
        title = titles[method].format(version=theirs["version"])
        for what, column, form in (cost for cost in COSTS if cost[1] in by_method):
            mine, other = f"{ours[column]:{form}}", f"{theirs[column]:{form}}"
            small = column == "op_mem_mb" and ours[column] - theirs[column] < 1
            if ours[column] > NOISE * theirs[column] and not small:
                lines.append({"where": where, "what": what, "ours": mine, "theirs": other,
                              "title": title, "record": record})  # fmt: skip
    return lines


def _worse_runs(record: Record) -> list[dict[str, Any]]:
    """Return lines of a training record: costs above those of another method, or a loss that is
    higher than with full logits by more than two standard errors of the seeds.
    """
    runs, lines = record.runs, []
    if not {FULL, "cce"} <= set(runs["method"]):
        return []
    tuned = [title for name, title in TUNED.items() if Path(record.name).name.startswith(name)]
    where = f"{tuned[0]} {record.model}" if tuned else "Pretraining"
    shared = {"where": f"{where}, {record.device}", "title": "full logits",
              "record": link_run(record)}  # fmt: skip
    cost = costs(runs)
    for method in (name for name in cost.index if name in RIVALS):
        for what, column, form in (("ms a step", "ms_per_step", ".1f"),
                                   ("peak, MiB", "peak_mib", ",.0f")):  # fmt: skip
            ours, theirs = cost.loc["cce", column], cost.loc[method, column]
            if ours > NOISE * theirs and (column != "ms_per_step" or apart(runs, "cce", method)):
                lines.append({**shared, "what": what, "ours": f"{ours:{form}}",
                              "theirs": f"{theirs:{form}}", "title": RIVALS[method]})  # fmt: skip
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
    "Fine-tuning on two GPUs: FSDP2, and classes divided": (
        "experiments/several_gpus_*.json",
        "torchrun --nproc-per-node 2 -m experiments.several_gpus"),
    "Eight GPUs of one host": ("*/distributed_8.json", "python -m benchmark.distributed"),
    "Distillation of one real model into a smaller one": (
        "experiments/distill_*.json", "python -m experiments.distill"),
    "LoRA on the head, frozen head, QLoRA": (
        "experiments/finetune_*-lora*.json", "python -m experiments.finetune --lora 16"),
}  # fmt: skip
"""Contents of the page: a pattern of its records, and the command that measures it."""


def missing(_: Measurements, __: Records, folder: Path) -> str:
    """Name the experiments that have no record below ``folder``."""
    return "\n".join(
        f"- {name}: not measured yet (`{command}`)."
        for name, (pattern, command) in WANTED.items()
        if not any(folder.glob(pattern))
    )


BLOCKS: dict[str, Callable[[Measurements, Records, Path], str]] = {
    "evidence-verdict": verdict,
    "evidence-summary": summary,
    "evidence-layer": layer,
    "evidence-finetune": finetune,
    "evidence-distill": distill,
    "evidence-pretrain": pretrain,
    "evidence-trainers": trainers,
    "evidence-gpus": gpus,
    "evidence-several-gpus": several_gpus,
    "evidence-against": against,
    "evidence-missing": missing,
}
