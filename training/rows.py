"""The rows of a run as PyTorch data sets: all in memory, or read from the source as they come."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from training.config import TrainConfig
from training.data import documents
from training.packing import Row, one_by_one, pack

RowMaker = Callable[[], Iterator[Row]]
"""Reads the source from its beginning."""


class LoadedRows(Dataset):
    """All rows of a source.

    Args:
        rows: the rows.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        if not rows:
            raise ValueError("no row")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def fingerprint(self) -> str:
        """A hash of all tokens and labels: whether a run goes on with the data it began with."""
        total = hashlib.sha256()
        for row in self.rows:
            for name in ("input_ids", "labels"):
                total.update(row[name].numpy().tobytes())
        return total.hexdigest()

    def without(self, count: int, seed: int) -> tuple["LoadedRows", "LoadedRows"]:
        """These rows less ``count`` that the seed picks, and those."""
        order = torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        picked = set(order[:count])
        kept = [row for i, row in enumerate(self.rows) if i not in picked]
        return LoadedRows(kept), LoadedRows([self.rows[i] for i in sorted(picked)])


class StreamedRows(IterableDataset):
    """Rows that are made while they are used, over and over: memory does not grow with the source.

    A resumed run reads what came before its checkpoint once more.

    Args:
        make_rows: starts reading the source anew.
        source: the file or name; its size and ends are the fingerprint.
        seed: decides the order, with the number of the pass.
        buffer: rows that are held to be mixed; each comes out at a random time.
    """

    def __init__(self, make_rows: RowMaker, source: str, seed: int, buffer: int) -> None:
        self.make_rows, self.source, self.seed, self.buffer = make_rows, source, seed, buffer

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
        """A hash of the file's size, beginning and end, or of the name."""
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


def load_data(config: TrainConfig, tokenizer: Any) -> tuple[Any, LoadedRows | None]:
    """The rows to train on and those that are held out.

    Raises:
        FileNotFoundError: no such data.
        ValueError: it cannot be read, or is too short.
    """
    make = _row_maker(config, tokenizer, config.data, config.data_split)
    held_out = None
    if config.eval_data is not None:
        held_out = _load(_row_maker(config, tokenizer, config.eval_data, config.eval_split), config)
    if config.streaming:
        if next(make(), None) is None:
            raise _too_short(config)
        return StreamedRows(make, config.data, config.seed, config.shuffle_buffer), held_out
    data = _load(make, config)
    if config.eval_fraction:
        count = max(1, round(config.eval_fraction * len(data)))
        if count == len(data):
            raise ValueError(f"eval_fraction leaves nothing of {len(data)} sequences to train on")
        data, held_out = data.without(count, config.seed)
    return data, held_out


def _row_maker(config: TrainConfig, tokenizer: Any, source: str, split: str) -> RowMaker:
    def make() -> Any:
        found = documents(source, split, config.data_column, config.streaming)
        if config.packing:
            return pack(found, tokenizer, config.sequence_length, config.isolate_documents)
        return one_by_one(found, tokenizer, config.sequence_length)

    return make


def _load(make: RowMaker, config: TrainConfig) -> LoadedRows:
    rows = list(make())
    if not rows:
        raise _too_short(config)
    return LoadedRows(rows)


def _too_short(config: TrainConfig) -> ValueError:
    return ValueError(
        f"data makes no sequence to learn from: with packing it needs at least "
        f"{config.sequence_length} tokens (sequence_length), without it two"
    )
