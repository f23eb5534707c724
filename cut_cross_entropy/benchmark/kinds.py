"""Kinds of passes: what is computed, and whether its forward, its backward or both are timed.

Kinds of post-training may ask for more, joined by "+": ``logprobs-fw-bw+entropy+rank``.
"""

from dataclasses import dataclass

KINDS = ("loss-fw", "loss-bw", "loss-fw-bw")
"""Passes of the mean loss, which are measured if no kinds are named."""

TOKEN_KINDS = {
    "logprobs-fw": ("entropy", "temperature", "rank", "candidates"),
    "logprobs-fw-bw": ("entropy", "temperature", "rank", "candidates"),
    "divergence-fw": ("reverse", "jsd", "temperature"),
    "divergence-fw-bw": ("reverse", "jsd", "temperature"),
}
"""Passes of results for each token, and what each may ask for in addition."""

_PRODUCTS = {"loss": (1, 2), "logprobs": (1, 2), "divergence": (2, 2)}


@dataclass(frozen=True)
class Kind:
    """A kind of passes.

    Args:
        subject: ``"loss"``, ``"logprobs"`` or ``"divergence"``.
        part: ``"fw"``, ``"bw"`` or ``"fw-bw"``.
        additions: what is asked for in addition.
    """

    subject: str
    part: str
    additions: frozenset[str] = frozenset()

    @property
    def products(self) -> int:
        """Matrix products that an exact computation cannot do without: what TFLOP/s count."""
        forward, backward = _PRODUCTS[self.subject]
        return forward * ("fw" in self.part) + backward * ("bw" in self.part)


def parse(name: str) -> Kind:
    """Read the name of a kind.

    Raises:
        ValueError: unknown name or addition, or an addition twice.
    """
    base, *additions = name.split("+")
    if base not in (*KINDS, *TOKEN_KINDS):
        raise ValueError(f"kind must be one of {', '.join((*KINDS, *TOKEN_KINDS))}, got {name!r}")
    allowed = TOKEN_KINDS.get(base, ())
    if not set(additions) <= set(allowed) or len(set(additions)) < len(additions):
        known = ", ".join(f"+{each}" for each in allowed) or "nothing"
        raise ValueError(f"{base} may be followed by {known}, each once, got {name!r}")
    if {"reverse", "jsd"} <= set(additions):
        raise ValueError(f"+reverse and +jsd exclude each other, got {name!r}")
    subject, part = base.split("-", 1)
    return Kind(subject, part, frozenset(additions))
