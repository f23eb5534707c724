"""Tables and plots of docs/experiments.md from the records of the training experiments."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from docs.page import number, table
from docs.plots import Plot, curves, rarity, run_name, short

NAMES = ("finetune", "pretrain")
FULL = "full"
LAST_STEPS = 20
"""Steps whose training losses are averaged at the end of a run."""
KEY = ["method", "seed"]


@dataclass(frozen=True)
class Record:
    """One file.

    Args:
        name: of the file, without ``.json``.
        content: all of it.
        runs: a row for each method and seed, with the figures of the last look at held-out text.
    """

    name: str
    content: dict[str, Any]
    runs: pd.DataFrame

    @property
    def methods(self) -> list[str]:
        """Methods in the order of the file."""
        return list(dict.fromkeys(self.runs["method"]))

    @property
    def device(self) -> str:
        """Name of the device."""
        return str(self.content["machine"]["device"])

    def by_seed(self) -> dict[str, dict[int, Any]]:
        """Return the runs by method and seed, as the file has them."""
        found: dict[str, dict[int, Any]] = {}
        for run in self.content["runs"]:
            found.setdefault(run["method"], {})[run["seed"]] = run
        return found


Records = dict[str, list[Record]]
"""Records by the name of the experiment."""


def read(folder: Path) -> Records:
    """Read all records of a folder.

    Raises:
        ValueError: a file is not what an experiment writes.
    """
    return {name: [load(path) for path in sorted(folder.glob(f"{name}_*.json"))] for name in NAMES}


def load(path: Path) -> Record:
    """Read a record; see :func:`read`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [figures(run) for run in content["runs"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a record of an experiment: {error!r}") from error
    runs = pd.DataFrame(rows, columns=list(rows[0]) if rows else KEY)
    runs = runs.drop_duplicates(KEY, keep="last", ignore_index=True)
    if FULL not in set(runs["method"]):
        raise ValueError(f"{path} has no run with full logits to compare with")
    return Record(path.stem, content, runs)


def figures(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a run; of held-out text those of the last look, named as in tables."""
    last = run["judged"][-1]
    found = {key: run.get(key) for key in (*KEY, "losses", "ms_per_step", "peak_mib")}
    found["held-out loss"] = last["held_out_loss"]
    if "rarest_tenth" in last:
        found["rarest tenth"] = last["rarest_tenth"]["loss"]
        for bucket in last["buckets"]:
            found[f"seen {bucket_name(bucket)}"] = bucket["loss"]
        found["probability on tokens never seen"] = last["unseen_mass"]
    return found


def bucket_name(bucket: Mapping[str, Any]) -> str:
    """Name a group of tokens by how often training saw them."""
    low, high = bucket["from"], bucket["below"]
    if high is None:
        return f"{low} times or more"
    return "never" if high == 1 else f"{low} to {high - 1} times"


def compared_columns(runs: pd.DataFrame) -> list[str]:
    """Return the columns that are figures of held-out text."""
    return list(runs.columns[runs.columns.get_loc("held-out loss") :])


def differences(runs: pd.DataFrame, method: str, against: str = FULL) -> pd.DataFrame:
    """Return ``method`` minus another of the same seed, a row for each seed that has both."""
    columns = compared_columns(runs)
    one, other = (runs[runs["method"] == m].set_index("seed")[columns].astype(float)
                  for m in (method, against))  # fmt: skip
    both = one.index.intersection(other.index).sort_values()
    return one.loc[both] - other.loc[both]


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
    content, runs = record.content, record.runs
    spread = ""
    losses = runs[runs["method"] == FULL]["held-out loss"]
    if len(losses) > 1:
        spread = ("Between the seeds the held-out loss of full logits spreads over "
                  f"{losses.max() - losses.min():.4f}.")  # fmt: skip
    curves_link = f"![Loss curves and their differences](images/{record.name}.png)"
    parts = [_heading(content)]
    if name == "finetune":
        parts += [
            _finetune_table(record),
            f"Held-out loss before training: {content['before']['held_out_loss']:.4f}. Last "
            f"training loss: mean of the last {LAST_STEPS} steps. {seeds_sentence(runs)}{spread}",
            curves_link,
        ]  # fmt: skip
    else:
        first = content["runs"][list(runs["method"]).index(FULL)]
        most = first["judged"][-1]["rarest_tenth"]["at_most"]
        parts += [
            _pretrain_table(record),
            seeds_sentence(runs).strip(),
            f"Rarest tenth: held-out targets whose token training saw at most {most} times (first "
            f"seed). {first['unseen_tokens']} tokens of the vocabulary were never seen. {spread} "
            "By how often training saw the target, the loss with full logits and the difference of "
            "each method from it (means over the seeds both have):",
            _rarity_table(record, first["judged"][-1]["buckets"]),
            curves_link,
            f"![Loss by rarity of the token](images/{record.name}_rare.png)",
        ]
    if content["skipped"]:
        names = ", ".join(f"`{run['method']}` seed {run['seed']}" for run in content["skipped"])
        parts.append(f"Not run, for lack of time: {names}.")
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _heading(content: Mapping[str, Any]) -> str:
    machine, data = content["machine"], content["data"]
    versions = ", ".join(f"{name} {x}" for name, x in machine["versions"].items() if x)
    settings = ", ".join(f"{k.replace('_', ' ')} {x}" for k, x in content["settings"].items())
    return (
        f"{machine['device']}, Python {machine['python']}, {versions}; commit "
        f"{(machine['commit'] or 'unknown')[:12]}, {machine['date']}. Settings: {settings}. Data: "
        f"{data['text']}, {data['tokens']} tokens, "
        f"{data['held_out_tokens']} held-out tokens."
    )


def _by_seed(runs: pd.DataFrame, method: str, column: str) -> str:
    if method == FULL:
        return ""
    return ", ".join(f"{x:+.4f}" for x in differences(runs, method)[column].dropna())


def _finetune_table(record: Record) -> str:
    runs, lines = record.runs, []
    full = runs[runs["method"] == FULL].set_index("seed")["losses"]
    for method in record.methods:
        own, shared = runs[runs["method"] == method], comparable(runs, method)
        steps = pd.Series(dtype=float)
        if method != FULL:
            pairs = own[own["seed"].isin(full.index)]
            steps = pd.concat(
                [(pd.Series(x) - pd.Series(full[s])).abs()
                 for s, x in zip(pairs["seed"], pairs["losses"], strict=True)] or [steps]
            )  # fmt: skip
        last = shared["losses"].map(lambda losses: pd.Series(losses[-LAST_STEPS:]).mean())
        lines.append(
            [f"`{method}`", str(len(own)), number(last.mean(), ".4f"),
             "" if steps.empty else f"{steps.max():.1e} / {steps.mean():.1e}",
             number(shared["held-out loss"].mean(), ".4f"),
             _by_seed(runs, method, "held-out loss"),
             f"{own['ms_per_step'].median():.1f}", f"{own['peak_mib'].max():.0f}"]
        )  # fmt: skip
    header = ("method", "seeds", "last training loss",
              "largest / mean difference from full logits", "held-out loss",
              "minus full logits, by seed", "ms a step", "peak MiB")  # fmt: skip
    return table(header, lines)


def _pretrain_table(record: Record) -> str:
    runs, lines = record.runs, []
    for method in record.methods:
        own, shared = runs[runs["method"] == method], comparable(runs, method)
        cells = [f"`{method}`", str(len(own))]
        for column in ("held-out loss", "rarest tenth"):
            cells += [number(shared[column].mean(), ".4f"), _by_seed(runs, method, column)]
        cells.append(number(shared["probability on tokens never seen"].mean(), ".2e"))
        lines.append([*cells, f"{own['ms_per_step'].median():.1f}", f"{own['peak_mib'].max():.0f}"])
    header = ("method", "seeds", "held-out loss", "minus full logits, by seed", "rarest tenth",
              "minus full logits, by seed", "probability on tokens never seen", "ms a step",
              "peak MiB")  # fmt: skip
    return table(header, lines)


def _rarity_table(record: Record, buckets: Sequence[Mapping[str, Any]]) -> str:
    others = [method for method in record.methods if method != FULL]
    means = {method: differences(record.runs, method).mean() for method in others}
    full = record.runs[record.runs["method"] == FULL]
    lines = []
    for bucket in buckets:
        column = f"seen {bucket_name(bucket)}"
        if bucket["targets"]:
            lines.append(
                [bucket_name(bucket), str(bucket["targets"]), number(full[column].mean(), ".4f"),
                 *(number(means[method][column], "+.4f") for method in others)]
            )  # fmt: skip
    header = ("seen in training", "targets", run_name(FULL), *(f"`{m}`" for m in others))
    return table(header, lines)


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
    columns = compared_columns(records[0])
    methods = dict.fromkeys(m for runs in records for m in runs["method"] if m != FULL)
    lines = []
    for method, against in [*((m, FULL) for m in methods), ("cce", "cce_exact")]:
        found = pd.concat([differences(runs, method, against) for runs in records])
        if len(found):
            cells = [mean_and_error(found[column]) for column in columns]
            lines.append([f"`{method}` - `{against}`", str(len(found)), *cells])
    return table(("difference", "pairs", *columns), lines)


def mean_and_error(values: pd.Series) -> str:
    """Format the mean and, of several values, its standard error; "" of none."""
    values = values.dropna()
    if values.empty:
        return ""
    mean = values.mean()
    digits = ".1e" if 0 < abs(mean) < 1e-3 and values.abs().max() < 1e-2 else ".4f"
    text = f"{mean:+{digits}}"
    return text if len(values) == 1 else f"{text} ± {values.sem():{digits}}"


def plots_of(records: Records) -> list[Plot]:
    """Return the plots of all records."""
    found = []
    for record in records["finetune"]:
        settings = record.content["settings"]
        title = (f"Fine-tuning SmolLM2 135M, batches of {settings['batch_size']} x "
                 f"{settings['length']:,} tokens, {short(record.device)}")  # fmt: skip
        found.append(curves(record.by_seed(), record.name, title, 1))
    for record in records["pretrain"]:
        settings, runs = record.content["settings"], record.by_seed()
        title = (f"Pretraining a Llama of {settings['layers']} layers from scratch, vocabulary "
                 f"{settings['vocabulary']:,}, {short(record.device)}")  # fmt: skip
        found.append(curves(runs, record.name, title, 25))
        buckets = next(iter(runs[FULL].values()))["judged"][-1]["buckets"]
        names = [bucket_name(bucket) for bucket in buckets]
        found.append(rarity(runs, f"{record.name}_rare", title, names))
    return found
