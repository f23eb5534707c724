"""The picture of strips and tail: a small problem, filtered as the kernels filter."""

from typing import Any

from benchmark.plots import Plot, figure

TOKENS, CLASSES, STRIP = 48, 96, 8


def strips_and_tail() -> Plot:
    """Probabilities, the strips that are kept, and the rank-one matrix for the rest."""
    points = {"tokens": TOKENS, "classes": CLASSES, "strip": STRIP, "version": 2}
    return Plot("strips", points, draw)


def draw(points: dict[str, Any]) -> Any:
    """Computed, not painted: softmax of a low-rank product, strips by energy."""
    import numpy as np

    tokens, classes, strip = points["tokens"], points["classes"], points["strip"]
    random = np.random.default_rng(3)
    topics = random.normal(size=(tokens // strip, 6)).repeat(strip, 0)
    e = topics * 1.1 + 0.8 * random.normal(size=(tokens, 6))
    c = random.normal(size=(classes, 6))
    logits = e @ c.T - 1.1 * np.log(np.arange(classes) + 1.5)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    energy = np.square(p).reshape(-1, strip, classes).sum(1)
    order = np.sort(energy, axis=None)
    threshold = order[np.searchsorted(np.cumsum(order), 0.003 * energy.sum())]
    kept = (energy >= threshold).repeat(strip, 0)
    dropped = np.where(kept, 0, p)
    mass, weight = dropped.sum(1), np.sqrt(np.where(energy >= threshold, 0, energy)).sum(0)
    tail = np.outer(mass, weight) / weight.sum()

    from matplotlib.colors import LogNorm

    made, axes = figure(3, 4.0, 3.3)
    share = kept.mean()
    panels = (
        (p, "probabilities of 48 tokens x 96 classes"),
        (np.where(kept, p, np.nan), f"kept: strips of 8 tokens, {share:.0%}"),
        (tail, "in place of the rest: a column times a row"),
    )
    for ax, (values, text) in zip(axes, panels, strict=True):
        shown = ax.imshow(
            values, norm=LogNorm(1e-4, 1), cmap="magma_r", aspect="auto", interpolation="nearest"
        )
        ax.set_title(text, fontsize=9)
        ax.set_xlabel("classes, frequent ones first")
        ax.set_yticks([])
        for line in range(strip, tokens, strip):
            ax.axhline(line - 0.5, color="gray", linewidth=0.4)
    axes[0].set_ylabel("tokens")
    made.colorbar(shown, ax=axes, shrink=0.8, label="probability")
    return made
