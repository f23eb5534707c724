"""The picture of two loss curves."""

from collections.abc import Sequence
from pathlib import Path


def plot_losses(full: Sequence[float], cut: Sequence[float], cut_name: str, path: Path) -> None:
    """Draw both curves over each other and their difference below, as a PNG at ``path``."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, len(full) + 1)
    # The wide pale line stays visible under the thin dark one, though they coincide.
    above.plot(steps, full, color="#f2a65a", linewidth=6, label="full logits")
    above.plot(steps, cut, color="#1b3a5c", linewidth=1.5, label=cut_name)
    above.set_ylabel("loss (nats)")
    above.legend(frameon=False)
    above.set_title("Fine-tuning with full logits and without")

    below.plot(steps, [b - a for a, b in zip(full, cut, strict=True)], color="#1b3a5c")
    below.axhline(0, color="#999999", linewidth=0.8)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
