"""The rows of a run as PyTorch data sets: all in memory, or read from the source as they come."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset

from training.packing import Row

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
