"""The pictures of the experiments, each marked with the file that it was made from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.loop import REORDERED
from training.losses import FULL

COLOURS = {FULL: "#f2a65a", "cce": "#1b3a5c", "cce_exact": "#3a9188", REORDERED: "#b0b0b0"}
OTHER = "#8a4f7d"
LABELS = {FULL: "full logits", REORDERED: "full logits, batch reversed"}

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Runs by method and seed."""


def label(method: str) -> str:
    """What pictures and tables call ``method``."""
    return LABELS.get(method, method)


def plot_curves(runs: Runs, title: str, smooth: int, path: Path, source: str) -> None:
    """Draw the loss of every step, and below it each method's distance from full logits.

    Args:
        runs: by method and seed; the curves above are of the first seed that full logits have.
        title: of the picture.
        smooth: steps of the running mean; 1 for none.
        path: the PNG file.
        source: written into the file, for a check that it is not stale.
    """
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    seed = min(runs[FULL])
    for method, by_seed in runs.items():
        if method == REORDERED or seed not in by_seed:
            continue
        losses = _smooth(by_seed[seed]["losses"], smooth)
        # The wide pale line stays visible under the thin dark ones, though they coincide.
        width = 5.0 if method == FULL else 1.2
        above.plot(*losses, color=_colour(method), linewidth=width, label=label(method))
    above.set_ylabel("loss (nats)")
    above.set_title(title)
    above.legend(frameon=False)

    drawn = [method for method in (REORDERED, *runs) if method in runs and method != FULL]
    for method in dict.fromkeys(drawn):
        for i, (each, run) in enumerate(sorted(runs[method].items())):
            if each not in runs[FULL]:
                continue
            difference = np.subtract(run["losses"], runs[FULL][each]["losses"])
            name = label(method) if i == 0 else None
            below.plot(*_smooth(difference, smooth), color=_colour(method), lw=0.9, label=name)
    below.axhline(0, color="#999999", linewidth=0.8)
    below.set_ylabel("minus full logits,\nsame seed (nats)")
    below.set_xlabel("step" if smooth == 1 else f"step (mean of {smooth})")
    below.legend(frameon=False, fontsize="small", ncols=3)
    _save(figure, (above, below), path, source)


def plot_rarity(runs: Runs, path: Path, source: str) -> None:
    """Draw the held-out loss by how often training saw the token, and the distances below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 2])
    methods = list(runs)
    names = [bucket_name(bucket) for bucket in _last(runs[FULL], min(runs[FULL]))["buckets"]]
    for i, method in enumerate(methods):
        shift = (i - (len(methods) - 1) / 2) * 0.18
        for j, (seed, _) in enumerate(sorted(runs[method].items())):
            if seed not in runs[FULL]:
                continue
            own = [bucket["loss"] for bucket in _last(runs[method], seed)["buckets"]]
            full = [bucket["loss"] for bucket in _last(runs[FULL], seed)["buckets"]]
            places = [k + shift for k, value in enumerate(own) if value is not None]
            values = [value for value in own if value is not None]
            style: dict[str, Any] = {"color": _colour(method), "marker": "o", "linestyle": ""}
            name = label(method) if j == 0 else None
            above.plot(places, values, **style, label=name)
            if method != FULL:
                distances = [a - b for a, b in zip(own, full, strict=True) if a is not None]
                below.plot(places, distances, **style)
    above.set_ylabel("held-out loss (nats)")
    above.set_title("Tokens by how often training saw them; one dot a seed")
    above.legend(frameon=False)
    below.axhline(0, color="#999999", linewidth=0.8)
    below.set_ylabel("minus full logits,\nsame seed (nats)")
    below.set_xticks(range(len(names)), names)
    _save(figure, (above, below), path, source)


def bucket_name(bucket: Mapping[str, Any]) -> str:
    """What tables and pictures call a group of tokens."""
    low, high = bucket["from"], bucket["below"]
    if high is None:
        return f"{low} times or more"
    return "never" if high == 1 else f"{low} to {high - 1} times"


def source_of(path: Path) -> str | None:
    """What ``source`` was when the PNG at ``path`` was made."""
    from PIL import Image

    with Image.open(path) as image:
        source: str | None = image.info.get("Source")
    return source


def _last(by_seed: Mapping[int, Mapping[str, Any]], seed: int) -> Mapping[str, Any]:
    judged: Sequence[Mapping[str, Any]] = by_seed[seed]["judged"]
    return judged[-1]


def _smooth(values: Sequence[float], width: int) -> tuple[Any, Any]:
    """Steps and running means."""
    width = min(width, len(values))
    means = np.convolve(values, np.full(width, 1 / width), mode="valid")
    return np.arange(width, len(values) + 1), means


def _colour(method: str) -> str:
    return COLOURS.get(method, OTHER)


def _save(figure: Any, axes: Sequence[Any], path: Path, source: str) -> None:
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Source": source})
