"""Rows of a run as PyTorch data sets: in memory, or streamed from the source."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from training.config import TrainConfig
from training.data import PAIR, Document, documents
from training.objectives import DPO
from training.packing import IGNORED, Row, is_learned, make_pairs, make_rows

RowMaker = Callable[[], Iterator[Row]]
"""Read the source from its beginning."""


class LoadedRows(Dataset):
    """Hold all rows of a source.

    Args:
        rows: the rows.
        unanswered: conversations of the source that teach nothing: no assistant says anything.
    """

    def __init__(self, rows: Sequence[Row], unanswered: int = 0) -> None:
        self.rows, self.unanswered = rows, unanswered

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def fingerprint(self) -> str:
        """Hash all tokens and labels, to tell whether a resumed run has the data it began with."""
        total = hashlib.sha256()
        for row in self.rows:
            for name in ("input_ids", "labels"):
                total.update(row[name].numpy().tobytes())
        return total.hexdigest()

    def without(self, count: int, seed: int) -> tuple["LoadedRows", "LoadedRows"]:
        """Split off ``count`` rows that the seed picks; return the others and those."""
        order = torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        picked = set(order[:count])
        kept = [row for i, row in enumerate(self.rows) if i not in picked]
        return LoadedRows(kept, self.unanswered), LoadedRows([self.rows[i] for i in sorted(picked)])


class StreamedRows(IterableDataset):
    """Make rows while they are used, pass after pass, in memory independent of the source's size.

    A resumed run reads again what precedes its checkpoint.

    Args:
        make_rows: starts reading the source anew.
        source: the file or name; its size and ends are the fingerprint.
        seed: decides the order, with the number of the pass.
        buffer: rows held for mixing; each comes out at a random time.
        unanswered: tells how many conversations of the current pass taught nothing so far.
    """

    def __init__(
        self,
        make_rows: RowMaker,
        source: str,
        seed: int,
        buffer: int,
        unanswered: Callable[[], int] = lambda: 0,
    ) -> None:
        self.make_rows, self.source, self.seed, self.buffer = make_rows, source, seed, buffer
        self.unanswered = unanswered

    def __iter__(self) -> Iterator[Row]:
        for epoch in itertools.count():
            yield from self._one_pass(epoch)

    def _one_pass(self, epoch: int) -> Iterator[Row]:
        # Not the global generator: the order must not depend on what the model drew.
        draw = random.Random(self.seed * 1_000_003 + epoch)
        held: list[Row] = []
        for row in self.make_rows():
            if len(held) < self.buffer:
                held.append(row)
                continue
            place = draw.randrange(self.buffer)
            out, held[place] = held[place], row
            yield out
        draw.shuffle(held)
        yield from held

    def fingerprint(self) -> str:
        """Hash the file's size, beginning and end, or the name."""
        path = Path(self.source)
        total = hashlib.sha256(self.source.encode() if not path.is_file() else b"")
        if path.is_file():
            size = path.stat().st_size
            total.update(str(size).encode())
            with path.open("rb") as file:
                total.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                total.update(file.read())
        return total.hexdigest()


def load_data(
    config: TrainConfig, tokenizer: Any, vocabulary: int
) -> tuple["LoadedRows | StreamedRows", LoadedRows | None]:
    """Load the rows to train on and those that are held out.

    Args:
        config: settings of the run.
        tokenizer: makes the tokens.
        vocabulary: number of token ids that the model knows.

    Raises:
        FileNotFoundError: no such data.
        ValueError: it cannot be read, is too short, has nothing to learn, or has tokens beyond the
            vocabulary.
    """
    train = Source(
        "--data", config.data, config.data_split, config, tokenizer=tokenizer, vocabulary=vocabulary
    )
    held_out = None
    if config.eval_data is not None:
        held_out = replace(
            train, flag="--eval-data", name=config.eval_data, split=config.eval_split
        ).load()
    if config.streaming:
        train.require_labels(train.rows())
        streamed = StreamedRows(
            train.rows, config.data, config.seed, config.shuffle_buffer, lambda: train.unanswered
        )
        return streamed, held_out
    data = train.load()
    if config.eval_fraction:
        count = max(1, round(config.eval_fraction * len(data)))
        if count == len(data):
            raise ValueError(
                f"--eval-fraction {config.eval_fraction} leaves nothing of {len(data)} sequences "
                "to train on"
            )
        data, held_out = data.without(count, config.seed)
    return data, held_out


def load_windows(config: TrainConfig, tokenizer: Any, vocabulary: int) -> Tensor:
    """Load text as sequences of equal length, (n, T), int64.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_data`; and conversations are not text.
    """
    data, _ = load_data(config, tokenizer, vocabulary)
    assert isinstance(data, LoadedRows)
    if any((row["labels"] == IGNORED).any() for row in data.rows):
        raise ValueError(f"--data {config.data!r} holds conversations, not text")
    return torch.stack([row["input_ids"] for row in data.rows])


@dataclass
class Source:
    """Data that a flag names, and how rows are made of it."""

    flag: str
    name: str
    split: str
    config: TrainConfig
    tokenizer: Any
    vocabulary: int
    unanswered: int = 0
    """Conversations without a message of an assistant, of those read in the current pass."""

    def documents(self, completion: str = "completion") -> Iterator[Document]:
        """Read the data from its beginning."""
        config, self.unanswered = self.config, 0
        for document in documents(
            self.name,
            self.split,
            config.data_column,
            config.streaming,
            flag=self.flag,
            completion=completion,
        ):
            if document.messages is not None and "assistant" not in document.roles:
                self.unanswered += 1
            yield document

    def rows(self) -> Iterator[Row]:
        """Make rows of the data, from its beginning."""
        config = self.config
        if config.objective == DPO:
            chosen, rejected = (self.documents(completion) for completion in PAIR)
            rows = make_pairs(chosen, rejected, self.tokenizer, config.sequence_length)
        else:
            rows = make_rows(
                self.documents(),
                self.tokenizer,
                config.sequence_length,
                config.packing,
                config.isolate_documents,
            )
        for row in rows:
            highest = int(row["input_ids"].max())
            if highest >= self.vocabulary:
                raise ValueError(
                    f"--tokenizer gives {self.flag} {self.name!r} the token id {highest}, but the "
                    f"embedding of --model has {self.vocabulary} rows"
                )
            yield row

    def load(self) -> LoadedRows:
        """Make all rows."""
        rows = list(self.rows())
        self.require_labels(iter(rows))
        return LoadedRows(rows, self.unanswered)

    def require_labels(self, rows: Iterator[Row]) -> None:
        """Raise ``ValueError`` unless a row has a token to learn."""
        if any(map(is_learned, rows)):
            return
        roles = {role for document in self.documents() for role in document.roles}
        if roles and "assistant" not in roles:
            raise ValueError(
                f"{self.flag} {self.name!r} has nothing to learn: its conversations have messages "
                f"of {', '.join(sorted(roles))}, none of an assistant"
            )
        raise ValueError(
            f"{self.flag} {self.name!r} makes no sequence to learn from: with --packing it needs "
            f"at least {self.config.sequence_length} tokens (--sequence-length), without it two"
        )
