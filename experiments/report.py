"""Make the tables and pictures of ``docs/experiments.md`` from the measurements that are kept.

    python -m experiments.report

Replaces what stands between the markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and
writes the pictures to ``docs/images``. Nothing is measured here.
"""

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import together
from experiments.figures import Runs, bucket_name, label, plot_curves, plot_rarity
from experiments.options import MEASUREMENTS
from training.losses import FULL

ROOT = Path(__file__).resolve().parents[1]

PAGE = Path("docs/experiments.md")
IMAGES = Path("docs/images")

NOT_MEASURED = "Not measured yet."

Record = tuple[dict[str, Any], Runs, str]
"""Content of a file, its runs by method and seed, and its hash."""

LAST_STEPS = 20
"""Steps whose training losses are averaged at the end of a run."""


def make_page(root: Path, draw: bool = True) -> str:
    """The text of the page below ``root``, with tables of the measurements that are kept there.

    Args:
        root: of the repository.
        draw: whether the pictures are made too.

    Raises:
        ValueError: a marker is missing, or a file is not what an experiment writes.
    """
    page = (root / PAGE).read_text(encoding="utf-8")
    for experiment, section in SECTIONS.items():
        files = sorted((root / MEASUREMENTS).glob(f"{experiment}_*.json"))
        records = [load(path) for path in files]
        parts = [
            section(record, root / IMAGES / path.stem, draw)
            for path, record in zip(files, records, strict=True)
        ]
        parts += _all_records(records)
        page = _between_markers(page, experiment, "\n\n".join(parts) or NOT_MEASURED)
    return page


def _all_records(records: Sequence[Record]) -> list[str]:
    """One table of all records with the settings and the data of the first, if there are more."""
    same = [
        (content, runs)
        for content, runs, _ in records
        if all(content[part] == records[0][0][part] for part in ("settings", "data"))
    ]
    if len(same) < 2:
        return []
    machines = ", ".join(content["machine"]["device"] for content, _ in same)
    return [
        f"All together ({machines}): differences of two methods with the same seed on the same "
        "machine, mean ± standard error. `full` are full logits.",
        _table(together.table([runs for _, runs in same])),
    ]


def load(path: Path) -> Record:
    """The content of a file, its runs by method and seed, and its hash.

    Raises:
        ValueError: the file is not what an experiment writes.
    """
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for run in content["runs"]:
            runs.setdefault(run["method"], {})[run["seed"]] = run
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of an experiment: {error!r}") from error
    if FULL not in runs:
        raise ValueError(f"{path} has no run with full logits to compare with")
    return content, runs, hashlib.sha256(raw).hexdigest()


def finetune_section(record: Record, images: Path, draw: bool) -> str:
    """Tables and picture of one record of fine-tuning; names of pictures begin with ``images``."""
    content, runs, source = record
    picture = images.with_name(f"{images.name}.png")
    if draw:
        plot_curves(runs, "Fine-tuning SmolLM2-135M", 1, picture, source)
    rows = [
        ["method", "seeds", "last training loss", "largest / mean difference from full logits",
         "held-out loss", "minus full logits, by seed", "ms a step", "peak MiB"]
    ]  # fmt: skip
    for method, by_seed in runs.items():
        shared = _shared(runs, method)
        rows.append(
            [
                f"`{method}`",
                str(len(by_seed)),
                _mean(statistics.fmean(run["losses"][-LAST_STEPS:]) for run in shared),
                _curve_difference(runs, method),
                _mean(_judged(run)["held_out_loss"] for run in shared),
                _differences(runs, method, lambda last: last["held_out_loss"]),
                f"{statistics.median(run['ms_per_step'] for run in by_seed.values()):.1f}",
                f"{max(run['peak_mib'] for run in by_seed.values()):.0f}",
            ]
        )
    before = content["before"]["held_out_loss"]
    lines = [
        _heading(content),
        _table(rows),
        f"Held-out loss before training: {before:.4f}. Last training loss: mean of the last "
        f"{LAST_STEPS} steps. {_of_shared_seeds(runs)}{_seed_spread(runs)}",
        f"![Loss curves and their differences](images/{picture.name})",
        _skipped(content),
    ]
    return "\n\n".join(line for line in lines if line)


def pretrain_section(record: Record, images: Path, draw: bool) -> str:
    """Tables and pictures of one record of pretraining; see above."""
    content, runs, source = record
    curves, rarity = (images.with_name(f"{images.name}{end}.png") for end in ("", "_rare"))
    if draw:
        plot_curves(runs, "Pretraining from scratch", 25, curves, source)
        plot_rarity(runs, rarity, source)
    rows = [
        ["method", "seeds", "held-out loss", "minus full logits, by seed", "rarest tenth",
         "minus full logits, by seed", "probability on tokens never seen", "ms a step", "peak MiB"]
    ]  # fmt: skip
    for method, by_seed in runs.items():
        shared = _shared(runs, method)
        rows.append(
            [
                f"`{method}`",
                str(len(by_seed)),
                _mean(_judged(run)["held_out_loss"] for run in shared),
                _differences(runs, method, lambda last: last["held_out_loss"]),
                _mean(_judged(run)["rarest_tenth"]["loss"] for run in shared),
                _differences(runs, method, lambda last: last["rarest_tenth"]["loss"]),
                _mean((_judged(run)["unseen_mass"] for run in shared), ".2e"),
                f"{statistics.median(run['ms_per_step'] for run in by_seed.values()):.1f}",
                f"{max(run['peak_mib'] for run in by_seed.values()):.0f}",
            ]
        )
    lines = [
        _heading(content),
        _table(rows),
        _of_shared_seeds(runs).strip(),
        _rarity_note(runs),
        _table(_rarity_rows(runs)),
        f"![Loss curves and their differences](images/{curves.name})",
        f"![Loss by rarity of the token](images/{rarity.name})",
        _skipped(content),
    ]
    return "\n\n".join(line for line in lines if line)


SECTIONS: dict[str, Callable[[Record, Path, bool], str]] = {
    "finetune": finetune_section,
    "pretrain": pretrain_section,
}


def _shared_seeds(runs: Runs) -> set[int]:
    """Seeds of all methods, without those of a single run where others have several."""
    most = max(map(len, runs.values()))
    return set.intersection(*(set(own) for own in runs.values() if len(own) > 1 or most == 1))


def _shared(runs: Runs, method: str) -> list[Mapping[str, Any]]:
    """Runs of a method whose mean can be compared with those of others; none if it lacks some."""
    by_seed = runs[method]
    wanted = _shared_seeds(runs) or set(by_seed)
    return [by_seed[seed] for seed in wanted] if wanted <= set(by_seed) else []


def _of_shared_seeds(runs: Runs) -> str:
    shared = _shared_seeds(runs)
    if not shared or all(len(by_seed) == len(shared) for by_seed in runs.values()):
        return ""
    names = ", ".join(map(str, sorted(shared)))
    return f"Losses are means over the seeds {names}, of methods that have them all. "


def _rarity_note(runs: Runs) -> str:
    first = next(iter(runs[FULL].values()))
    most = _judged(first)["rarest_tenth"]["at_most"]
    return (
        f"Rarest tenth: held-out targets whose token training saw at most {most} times (first "
        f"seed). {first['unseen_tokens']} tokens of the vocabulary were never seen. "
        f"{_seed_spread(runs)} By how often training saw the target, the loss with full logits and "
        "the difference of each method from it (means over the seeds both have):"
    )


def _rarity_rows(runs: Runs) -> list[list[str]]:
    others = [method for method in runs if method != FULL]
    rows = [["seen in training", "targets", label(FULL), *(f"`{method}`" for method in others)]]
    first = _judged(next(iter(runs[FULL].values())))
    for i, bucket in enumerate(first["buckets"]):
        if not bucket["targets"]:
            continue
        pick = lambda last, i=i: last["buckets"][i]["loss"]
        cells = []
        for method in others:
            found = together.paired_differences([runs], method, pick)
            cells.append(f"{statistics.fmean(found):+.4f}" if found else "")
        losses = [x for run in runs[FULL].values() if (x := pick(_judged(run))) is not None]
        rows.append([bucket_name(bucket), str(bucket["targets"]), _mean(losses), *cells])
    return rows


def _judged(run: Any) -> Any:
    return run["judged"][-1]


def _curve_difference(runs: Runs, method: str) -> str:
    if method == FULL:
        return ""
    found = [
        abs(a - b)
        for seed, run in runs[method].items()
        if seed in runs[FULL]
        for a, b in zip(run["losses"], runs[FULL][seed]["losses"], strict=True)
    ]
    return f"{max(found):.1e} / {statistics.fmean(found):.1e}" if found else ""


def _differences(runs: Runs, method: str, pick: together.Pick) -> str:
    if method == FULL:
        return ""
    found = together.paired_differences([runs], method, pick)
    return ", ".join(f"{value:+.4f}" for value in found)


def _seed_spread(runs: Runs) -> str:
    losses = [_judged(run)["held_out_loss"] for run in runs[FULL].values()]
    if len(losses) < 2:
        return ""
    return (
        "Between the seeds the held-out loss of full logits spreads over "
        f"{max(losses) - min(losses):.4f}."
    )


def _heading(content: dict[str, Any]) -> str:
    machine, data = content["machine"], content["data"]
    versions = ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items() if version
    )
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in content["settings"].items()
    )
    return (
        f"{machine['device']}, Python {machine['python']}, {versions}; commit "
        f"{(machine['commit'] or 'unknown')[:12]}, {machine['date']}. Settings: {settings}. Data: "
        f"{data['text']}, {data['tokens']} tokens, "
        f"{data['held_out_tokens']} held-out tokens."
    )


def _skipped(content: dict[str, Any]) -> str:
    if not content["skipped"]:
        return ""
    names = ", ".join(f"`{run['method']}` seed {run['seed']}" for run in content["skipped"])
    return f"Not run, for lack of time: {names}."


def _mean(values: Iterable[float], digits: str = ".4f") -> str:
    found = list(values)
    return f"{statistics.fmean(found):{digits}}" if found else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join([":---"] + ["---:"] * (len(rows[0]) - 1)) + "|")
    return "\n".join(lines)


def _between_markers(page: str, name: str, text: str) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"{PAGE} must hold {begin} and, after it, {end} once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 0 done, 1 stale (with ``--check``), 2 wrong input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is stale")
    arguments = parser.parse_args(argv)
    path = arguments.root / PAGE
    try:
        page = make_page(arguments.root, draw=not arguments.check)
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        stale = page != path.read_text(encoding="utf-8")
        if stale:
            print(f"{path} is stale: run python -m experiments.report", file=sys.stderr)
        return int(stale)
    path.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
