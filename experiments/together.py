"""What all records of an experiment say together: differences of pairs, with their uncertainty.

A method is compared with full logits of the same seed on the same machine; the pairs of several
machines and seeds then make one mean.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.figures import Runs, bucket_name
from training.losses import FULL

Pick = Callable[[Mapping[str, Any]], float | None]
"""A number of the last look at held-out text, or None if it has none."""


def picks(judged: Mapping[str, Any]) -> dict[str, Pick]:
    """What can be compared, by the head of its column; ``judged`` is the last look of any run."""
    found: dict[str, Pick] = {"held-out loss": lambda last: last["held_out_loss"]}
    if "rarest_tenth" not in judged:
        return found
    found["rarest tenth"] = lambda last: last["rarest_tenth"]["loss"]
    for i, bucket in enumerate(judged["buckets"]):
        found[f"seen {bucket_name(bucket)}"] = _loss_of_bucket(i)
    found["probability on tokens never seen"] = lambda last: last["unseen_mass"]
    return found


def _loss_of_bucket(i: int) -> Pick:
    return lambda last: last["buckets"][i]["loss"]


def paired_differences(
    records: Sequence[Runs], method: str, pick: Pick, against: str = FULL
) -> list[float]:
    """``method`` minus another, for every seed that a record has of both."""
    found = []
    for runs in records:
        others = runs.get(against, {})
        for seed, run in sorted(runs.get(method, {}).items()):
            if seed in others:
                pair = [pick(one["judged"][-1]) for one in (run, others[seed])]
                found += [a - b for a, b in [pair] if a is not None and b is not None]
    return found


def mean_and_error(values: Sequence[float]) -> str:
    """The mean and, of several values, its standard error."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    digits = ".1e" if 0 < abs(mean) < 1e-3 and max(map(abs, values)) < 1e-2 else ".4f"
    if len(values) == 1:
        return f"{mean:+{digits}}"
    return f"{mean:+{digits}} ± {statistics.stdev(values) / len(values) ** 0.5:{digits}}"


def table(records: Sequence[Runs]) -> list[list[str]]:
    """Rows of cells: each method that some record has beside full logits, heads first.

    Last, what the filter makes of the kernels alone: ``cce`` beside ``cce_exact``.
    """
    methods = dict.fromkeys(method for runs in records for method in runs if method != FULL)
    last = next(iter(records[0][FULL].values()))["judged"][-1]
    columns = picks(last)
    rows = [["difference", "pairs", *columns]]
    for method, against in [*((method, FULL) for method in methods), ("cce", "cce_exact")]:
        found = [paired_differences(records, method, pick, against) for pick in columns.values()]
        if found[0]:
            name = f"`{method}` - `{against}`"
            rows.append([name, str(len(found[0])), *map(mean_and_error, found)])
    return rows
