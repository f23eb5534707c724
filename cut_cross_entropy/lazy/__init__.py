"""Lazy logits: losses of a model's head without its logits, whatever the model does in between.

>>> from cut_cross_entropy.lazy import lazy_head
>>> with lazy_head(model.lm_head):  # doctest: +SKIP
...     loss = model(ids, targets)
>>> loss.backward()  # doctest: +SKIP
"""

from cut_cross_entropy.lazy.context import lazy_head
from cut_cross_entropy.lazy.notices import CutCrossEntropyWarning

__all__ = ["CutCrossEntropyWarning", "lazy_head"]
