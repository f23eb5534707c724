"""Text from a file, from Python itself or from ``datasets``, cut into windows of tokens."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILTIN = "builtin"
"""Name of the text that every Python has: the language reference behind ``help()``."""


def load_text(source: str, split: str = "train", column: str = "text") -> str:
    """The text that ``source`` names.

    Args:
        source: ``"builtin"``, a UTF-8 text file, or a data set that ``datasets.load_dataset`` finds
            (``name`` or ``name:configuration``).
        split: split of a data set.
        column: column of a data set that holds text.

    Raises:
        FileNotFoundError: neither a file nor a data set.
        ValueError: nothing but white space in it, no UTF-8, or no such split or column.
    """
    if source == BUILTIN:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data {source!r} is not UTF-8 text: {error}") from error
    else:
        text = _dataset_text(source, split, column)
    if not text.strip():
        raise ValueError(f"data {source!r} holds no text")
    return text


def _dataset_text(source: str, split: str, column: str) -> str:
    problem = (
        f"data must be {BUILTIN!r}, a text file or the name of a data set, got {source!r}: "
        "there is no such file"
    )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FileNotFoundError(f"{problem}, and `datasets` is not installed") from error
    name, _, configuration = source.partition(":")
    try:
        dataset = load_dataset(name, configuration or None)
    except Exception as error:  # datasets and the hub client have no common class of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{problem}, and `datasets` says: {reason}") from error
    if split not in dataset:
        raise ValueError(f"data {source!r} has the splits {', '.join(dataset)}, got {split!r}")
    columns = dataset[split].column_names
    if column not in columns:
        raise ValueError(f"data {source!r} has the columns {', '.join(columns)}, got {column!r}")
    return "\n\n".join(str(row) for row in dataset[split][column])


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids of ``text``, int64, one dimension, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


class Windows:
    """Windows of ``length`` tokens without overlap, in a new order each epoch.

    What comes at a position depends on the seed and the position alone, so a position is all that
    a checkpoint has to keep.

    Args:
        tokens: one dimension.
        length: tokens a window, at least 2: the first has nothing to predict it.
        seed: decides the order.

    Raises:
        ValueError: fewer tokens than one window.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        self.count = len(tokens) // length
        if self.count == 0:
            raise ValueError(
                f"sequence length must be at most the {len(tokens)} tokens of the data, "
                f"got {length}"
            )
        self.windows = tokens[: self.count * length].view(self.count, length)
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, position: int, size: int) -> Tensor:
        """The ``size`` windows from ``position`` on, (size, length); epochs follow each other."""
        return torch.stack([self._window(position + i) for i in range(size)])

    def fingerprint(self) -> str:
        """A hash of the tokens: tells whether a run goes on with the data it began with."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()

    def _window(self, position: int) -> Tensor:
        epoch, index = divmod(position, self.count)
        if epoch != self._epoch:
            # Not the global generator: the order must not depend on what the model drew.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return self.windows[self._order[index]]
