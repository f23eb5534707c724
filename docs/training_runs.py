"""Tables and plots of docs/experiments.md from the records of the training experiments."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from docs.page import Column, table
from docs.plots import Plot, draw_curves, draw_rarity, minus, run_name, short

EARLIER = "earlier/pretrain"
"""Pretraining with kernels that have changed since in what their gradients skip."""
TUNED = {"finetune": "Fine-tuning", "distill": "Distillation of", "several_gpus": "Fine-tuning"}
"""Experiments with models that are trained already, as their titles begin."""
NAMES = (*TUNED, "pretrain", EARLIER)
FULL, REORDERED = "full", "full_reordered"
INDEPENDENT = (FULL, REORDERED)
"""Methods that use nothing of this package: their runs hold for every commit of it."""
MODELS = {"smollm2": "SmolLM2 135M", "smollm2-135m": "SmolLM2 135M", "gemma3-270m": "Gemma 3 270M"}
"""Names of models by those of their files without the ending."""
DIVERGENCES = {0: "forward KL", 1: "reverse KL", 0.5: "JSD"}
"""Names of divergences by their beta."""
USUAL_BATCH = 8
"""Sequences a step of the runs whose names do not say how many."""
LAST_STEPS = 20
"""Steps whose training losses are averaged at the end of a run."""
KEY = ["method", "seed"]
HELD_OUT, RAREST, UNSEEN = "held-out loss", "rarest tenth", "probability on tokens never seen"


@dataclass(frozen=True)
class Record:
    """One file.

    Args:
        name: of the file below the folder of records, without ``.json``.
        content: all of it.
        runs: a row for each method and seed, with the figures of the last look at held-out text.
        lender: record from which the last runs are, None where all are its own.
        lent: how many runs are.
    """

    name: str
    content: dict[str, Any]
    runs: pd.DataFrame
    lender: "Record | None" = None
    lent: int = 0

    @property
    def image(self) -> str:
        """Name of its plot."""
        return self.name.replace("/", "_")

    @property
    def own(self) -> pd.DataFrame:
        """Runs that no other record lent."""
        return self.runs[: len(self.runs) - self.lent]

    @property
    def device(self) -> str:
        """Name of the device."""
        return str(self.content["machine"]["device"])

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        settings = self.content["settings"]
        return int(settings["batch_size"] * settings["length"])

    @property
    def model(self) -> str:
        """Name of the model that is fine-tuned or distilled, and how."""
        settings = self.content["settings"]
        name = Path(settings["model"]).stem
        parts = [MODELS.get(name, name)]
        if "beta" in settings:
            other = f"generalised JSD, beta {settings['beta']:g}"
            parts.append(DIVERGENCES.get(settings["beta"], other))
        if "lora" in settings:
            head = "and of its head" if "lora_head" in settings else "under a frozen head"
            parts.append(f"LoRA of rank {settings['lora']} {head}")
            parts += ["4-bit weights"] * ("load_in_4bit" in settings)
        if "processes" in settings:
            parts[-1] += f" on {settings['processes']} processes"
        if (batch := settings["batch_size"]) != USUAL_BATCH:
            parts.append(f"{batch} sequences a step")
        return ", ".join(parts)


Records = dict[str, list[Record]]
"""Records by the name of the experiment."""


def read(folder: Path) -> Records:
    """Read all records of a folder.

    Raises:
        ValueError: a file is not what an experiment writes.
    """
    found = {name: [load(path, folder) for path in sorted(folder.glob(f"{name}_*.json"))]
             for name in NAMES}  # fmt: skip
    for records in found.values():  # adapters last
        records.sort(key=lambda record: "lora" in record.content["settings"])
    everything = [record for records in found.values() for record in records]
    return {name: [borrow(one, everything) for one in records] for name, records in found.items()}


def borrow(record: Record, others: Sequence[Record]) -> Record:
    """Add the runs of :data:`INDEPENDENT` methods that ``record`` lacks and another has, on the
    same device, with the same versions, settings and data.
    """

    def conditions(one: Record) -> list[Any]:
        machine = one.content["machine"]
        versions = {name: machine["versions"][name] for name in ("torch", "triton", "transformers")}
        return [machine["device"], versions, one.content["settings"], one.content["data"]]

    for other in others:
        if other is record or conditions(other) != conditions(record):
            continue
        known = set(zip(record.runs["method"], record.runs["seed"], strict=True))
        keys = zip(other.own["method"], other.own["seed"], strict=True)
        wanted = [key[0] in INDEPENDENT and key not in known for key in keys]
        if any(wanted):
            runs = pd.concat([record.runs, other.own[wanted]], ignore_index=True)
            return replace(record, runs=runs, lender=other, lent=sum(wanted))
    return record


def load(path: Path, folder: Path | None = None) -> Record:
    """Read a record below ``folder``, by default its own; see :func:`read`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [figures(run) for run in content["runs"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a record of an experiment: {error!r}") from error
    runs = pd.DataFrame(rows, columns=list(rows[0]) if rows else KEY)
    runs = runs.drop_duplicates(KEY, keep="last", ignore_index=True)
    costs = ["ms_per_step", "peak_mib"]
    runs = runs.astype({name: float for name in costs if name in runs})  # None: not measured
    if FULL not in set(runs["method"]):
        raise ValueError(f"{path} has no run with full logits to compare with")
    name = path.relative_to(folder or path.parent).with_suffix("").as_posix()
    return Record(name, content, runs)


def figures(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a run; of held-out text those of the last look, named as in tables."""
    last = run["judged"][-1]
    found = {key: run.get(key) for key in (*KEY, "losses", "ms_per_step", "peak_mib")}
    found[HELD_OUT] = last["held_out_loss"]
    if "rarest_tenth" in last:
        found[RAREST] = last["rarest_tenth"]["loss"]
        found |= {f"seen {bucket_name(bucket)}": bucket["loss"] for bucket in last["buckets"]}
        found[UNSEEN] = last["unseen_mass"]
    return found


def bucket_name(bucket: Mapping[str, Any]) -> str:
    """Name a group of tokens by how often training saw them."""
    low, high = bucket["from"], bucket["below"]
    if high is None:
        return f"{low} times or more"
    return "never" if high == 1 else f"{low} to {high - 1} times"


def compared_columns(runs: pd.DataFrame) -> list[str]:
    """Return the columns that are figures of held-out text."""
    return list(runs.columns[runs.columns.get_loc(HELD_OUT) :])


def differences(runs: pd.DataFrame, method: str, against: str = FULL) -> pd.DataFrame:
    """Return ``method`` minus another of the same seed, a row for each seed that has both."""
    by_seed = runs.set_index(KEY)[compared_columns(runs)].astype(float)
    return minus(by_seed.loc[method], by_seed.loc[against]).sort_index()


def shared_seeds(runs: pd.DataFrame) -> set[int]:
    """Return the seeds that all methods have, those of a single run among several left out."""
    seeds = runs.groupby("method")["seed"].agg(set)
    most = seeds.map(len).max()
    return set.intersection(*(own for own in seeds if len(own) > 1 or most == 1))


def comparable(runs: pd.DataFrame, method: str) -> pd.DataFrame:
    """Return the runs whose mean can be compared with other methods'; empty if it lacks some."""
    own = runs[runs["method"] == method]
    wanted = shared_seeds(runs) or set(own["seed"])
    return own[own["seed"].isin(wanted)] if wanted <= set(own["seed"]) else own[:0]


def seeds_sentence(runs: pd.DataFrame) -> str:
    """Say which seeds the means are over, if not over all."""
    shared = shared_seeds(runs)
    if not shared or all(n == len(shared) for n in runs.groupby("method").size()):
        return ""
    names = ", ".join(map(str, sorted(shared)))
    return f"Losses are means over the seeds {names}, of methods that have them all. "


def section(name: str, records: Records) -> str:
    """Return the block of one experiment: its records, and a table of all that are alike."""
    made = [_section(name, record) for record in records[name]]
    return "\n\n".join([*made, *all_together(records[name])])


def _section(name: str, record: Record) -> str:
    content, runs, kind = record.content, record.runs, Path(name).name
    losses = runs[runs["method"] == FULL][HELD_OUT]
    spread = ("Between the seeds the held-out loss of full logits spreads over "
              f"{losses.max() - losses.min():.4f}.") * (len(losses) > 1)  # fmt: skip
    curves_link = f"![Loss curves and their differences](images/{record.image}.png)"
    if kind in TUNED:
        parts = [
            f"### {record.model}",
            _heading(content),
            table(by_method(record), FINETUNE),
            f"Held-out loss before training: {content['before']['held_out_loss']:.4f}. Last "
            f"training loss: mean of the last {LAST_STEPS} steps. {seeds_sentence(runs)}{spread}",
            _largest(content),
            curves_link,
        ]
    else:
        first = next(run for run in content["runs"] if run["method"] == FULL)
        last = first["judged"][-1]
        parts = [
            _heading(content),
            table(by_method(record), PRETRAIN),
            seeds_sentence(runs).strip(),
            "Rarest tenth: held-out targets whose token training saw at most "
            f"{last['rarest_tenth']['at_most']} times (first seed). {first['unseen_tokens']} "
            f"tokens of the vocabulary were never seen. {spread} "
            "By how often training saw the target, the loss with full logits and the difference of "
            "each method from it (means over the seeds both have):",
            _rarity_table(runs, last["buckets"]),
            curves_link,
            f"![Loss by rarity of the token](images/{record.image}_rare.png)",
        ]
    if record.lender is not None:
        lent = runs[-record.lent :].groupby("method")["seed"].agg(list)
        names = "; ".join(f"`{m}` of seeds {', '.join(map(str, x))}" for m, x in lent.items())
        commit = record.lender.content["machine"]["commit"]
        parts.append(f"From the record of commit {commit}, since they use nothing of this "
                     f"package, on the same kind of machine and data: {names}.")  # fmt: skip
    if content["skipped"]:
        missing = pd.DataFrame(content["skipped"]).groupby("method", sort=False)["seed"].agg(list)
        names = ", ".join(f"`{m}` seed {', '.join(map(str, x))}" for m, x in missing.items())
        parts.append(f"Not run: {names}.")
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _largest(content: Mapping[str, Any]) -> str:
    """Return the table of the largest batches that fit, if they were looked for."""
    rows = [
        {"commit": content["machine"]["commit"], **row,
         "speed": 1e3 * row["tokens"] / row["ms_per_step"]}
        for row in content.get("largest", [])
        if row["tokens"]
    ]  # fmt: skip
    if not rows:
        return ""
    return "Largest batch that fits, to within a sixteenth:\n\n" + table(rows, LARGEST)


def _heading(content: Mapping[str, Any]) -> str:
    machine, data = content["machine"], content["data"]
    versions = ", ".join(f"{name} {x}" for name, x in machine["versions"].items() if x)
    settings = ", ".join(f"{k.replace('_', ' ')} {x}" for k, x in content["settings"].items())
    return (
        f"{machine['device']}, Python {machine['python']}, {versions}; commit "
        f"{(machine['commit'] or 'unknown')[:12]}, {machine['date']}. Settings: {settings}. Data: "
        f"{data['text']}, {data['tokens']} tokens, {data['held_out_tokens']} held-out tokens."
    )


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what a step of each method costs, a row for each: median time, largest peak."""
    return runs.groupby("method", sort=False).agg({"ms_per_step": "median", "peak_mib": "max"})


def by_method(record: Record) -> list[dict[str, Any]]:
    """Return a row for each method: means over the shared seeds, and differences by seed."""
    rows, runs, cost = [], record.runs, costs(record.runs)
    full = runs[runs["method"] == FULL].set_index("seed")["losses"]
    for method, own in runs.groupby("method", sort=False):
        shared, compared = comparable(runs, method), differences(runs, method)
        row: dict[str, Any] = {"method": method, "seeds": len(own)}
        for name in {HELD_OUT, RAREST, UNSEEN} & set(runs.columns):
            row[name] = shared[name].mean()
            values = (f"{x:+.4f}" for x in compared[name].dropna())
            row[f"difference of {name}"] = ", ".join(values) if method != FULL else ""
        if own["losses"].notna().all():
            row["last"] = shared["losses"].map(lambda x: pd.Series(x[-LAST_STEPS:]).mean()).mean()
            pairs = own[own["seed"].isin(full.index) & (method != FULL)]
            steps = [(pd.Series(x) - pd.Series(full[seed])).abs()
                     for seed, x in zip(pairs["seed"], pairs["losses"], strict=True)]  # fmt: skip
            if steps:
                row["largest"], row["mean"] = pd.concat(steps).max(), pd.concat(steps).mean()
        row["ms"], row["mib"] = cost.loc[method]
        row["speed"] = 1e3 * record.tokens / row["ms"]
        rows.append(row)
    return rows


METHOD: list[Column] = [("method", "`{method}`"), ("seeds", "{seeds}")]
COST: list[Column] = [
    ("ms a step", "{ms:.1f}"),
    ("tokens/s", "{speed:,.0f}"),
    ("peak MiB", "{mib:.0f}"),
]
LARGEST: list[Column] = [
    ("method", "`{method}`"),
    ("sequences", "{sequences}"),
    ("tokens", "{tokens:,}"),
    ("ms a step", "{ms_per_step:.0f}"),
    ("tokens/s", "{speed:,.0f}"),
    ("peak MiB", "{peak_mib:.0f}"),
    ("commit", "{commit}"),
]
BY_SEED = "minus full logits, by seed"
FINETUNE: list[Column] = [
    *METHOD,
    ("last training loss", "{last:.4f}"),
    ("largest / mean difference from full logits", "{largest:.1e} / {mean:.1e}"),
    (HELD_OUT, f"{{{HELD_OUT}:.4f}}"),
    (BY_SEED, f"{{difference of {HELD_OUT}}}"),
    *COST,
]
PRETRAIN: list[Column] = [
    *METHOD,
    (HELD_OUT, f"{{{HELD_OUT}:.4f}}"),
    (BY_SEED, f"{{difference of {HELD_OUT}}}"),
    (RAREST, f"{{{RAREST}:.4f}}"),
    (BY_SEED, f"{{difference of {RAREST}}}"),
    (UNSEEN, f"{{{UNSEEN}:.2e}}"),
    *COST,
]


def _rarity_table(runs: pd.DataFrame, buckets: Sequence[Mapping[str, Any]]) -> str:
    others = [method for method in dict.fromkeys(runs["method"]) if method != FULL]
    means = pd.DataFrame({method: differences(runs, method).mean() for method in others})
    means["full"] = runs[runs["method"] == FULL][means.index].astype(float).mean()
    means = means.rename(lambda name: name.removeprefix("seen "))
    names = {bucket_name(bucket): bucket["targets"] for bucket in buckets}
    rows = [{"name": name, "targets": n, **means.loc[name]} for name, n in names.items() if n]
    return table(
        rows,
        [("seen in training", "{name}"), ("targets", "{targets}"), (run_name(FULL), "{full:.4f}"),
         *((f"`{method}`", f"{{{method}:+.4f}}") for method in others)],
    )  # fmt: skip


def all_together(records: Sequence[Record]) -> list[str]:
    """Return a table of all records with the settings and the data of the first, if several."""
    alike = lambda one, other: all(one.content[x] == other.content[x] for x in ("settings", "data"))
    same = [record for record in records if alike(record, records[0])]
    if len(same) < 2:
        return []
    machines = ", ".join(record.device for record in same)
    return [
        f"All together ({machines}): differences of two methods with the same seed on the same "
        "machine, mean ± standard error. `full` are full logits.",
        paired_table([record.runs for record in same]).strip(),
    ]


def paired_table(records: Sequence[pd.DataFrame]) -> str:
    """Compare each method with full logits, and last ``cce`` with ``cce_exact``: what the filter
    alone does. Pairs have one seed and one record.
    """
    methods = dict.fromkeys(m for runs in records for m in runs["method"] if m != FULL)
    rows = []
    for method, against in [*((m, FULL) for m in methods), ("cce", "cce_exact")]:
        both = [runs for runs in records if {method, against} <= set(runs["method"])]
        found = pd.concat([differences(runs, method, against) for runs in both] or [pd.DataFrame()])
        if len(found):
            rows.append({"name": f"`{method}` - `{against}`", "pairs": len(found),
                         **found.agg(mean_and_error)})  # fmt: skip
    columns = [(name, f"{{{name}}}") for name in compared_columns(records[0])]
    return table(rows, [("difference", "{name}"), ("pairs", "{pairs}"), *columns])


def mean_and_error(values: pd.Series) -> str:
    """Format the mean and, of several values, its standard error; "" of none."""
    values = values.dropna()
    if values.empty:
        return ""
    mean = values.mean()
    error = 0.0 if len(values) == 1 else values.sem()
    digits = ".1e" if 0 < abs(mean) < 1e-3 and error < 1e-3 else ".4f"
    text = f"{mean:+{digits}}"
    return text if len(values) == 1 else f"{text} ± {error:{digits}}"


def plots_of(records: Records) -> list[Plot]:
    """Return the plots of all records."""
    found = []
    tuned = [(verb, one) for x, verb in TUNED.items() for one in records[x]]
    for verb, record in tuned:
        settings = record.content["settings"]
        title = (f"{verb} {record.model}, batches of {settings['batch_size']} x "
                 f"{settings['length']:,} tokens, {short(record.device)}")  # fmt: skip
        data = record.runs[[*KEY, "losses"]].assign(smooth=1)
        found.append(Plot(record.image, title, draw_curves, data))
    for record in (*records["pretrain"], *records[EARLIER]):
        settings, runs = record.content["settings"], record.runs
        title = (f"Pretraining a Llama from scratch, {settings['layers']} layers of "
                 f"{settings['width']:,} features, vocabulary {settings['vocabulary']:,}, "
                 f"{short(record.device)}")  # fmt: skip
        data = runs[[*KEY, "losses"]].assign(smooth=25)
        found.append(Plot(record.image, title, draw_curves, data))
        data = runs[[*KEY, *(column for column in runs if column.startswith("seen "))]]
        found.append(Plot(f"{record.image}_rare", title, draw_rarity, data))
    return found
