"""Kept measurements: every JSON file of a folder, with rows of one form whatever wrote them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.runs import PASSES
from benchmark.shapes import SHAPES

Row = dict[str, Any]

OTHER_PAGES = ("distributed", "training-processes")
"""Parts that are no rows of the benchmark's tables."""


@dataclass
class Device:
    """All that was measured on one device.

    Args:
        files: name and content of each file, newest form of the file last.
        rows: of all of them, each with its ``source`` and ``part``.
    """

    name: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def select(self, part: str | None = None, **equal: Any) -> list[Row]:
        """Rows with these values; a row of a later file replaces the same of an earlier one."""
        found: dict[tuple[Any, ...], Row] = {}
        for row in self.rows:
            if part is not None and row["part"] != part:
                continue
            if all(row.get(key) == value for key, value in equal.items()):
                found[row["test_data"], row["method"], row["kind"]] = row
        return list(found.values())

    def of_problem(self, test_data: str, method: str) -> dict[str, Row]:
        """Rows of a method by kind, of one run: the file with most kinds, the later of two."""
        by_file: dict[Any, dict[str, Row]] = {}
        for row in self.rows:
            if row["test_data"] == test_data and row["method"] == method:
                by_file.setdefault(row.get("source"), {})[row["kind"]] = row
        most = max(map(len, by_file.values()), default=0)
        return next((kinds for kinds in reversed(by_file.values()) if len(kinds) == most), {})

    def data_of(self, part: str) -> dict[str, Any] | None:
        """The file of a part that has a form of its own."""
        return next(iter(self.all_of(part)), None)

    def all_of(self, part: str) -> list[dict[str, Any]]:
        """All files of a part that has a form of its own."""
        return [content for content in self.files.values() if content.get("part") == part]

    @property
    def environments(self) -> list[dict[str, str]]:
        """The different ones of the benchmark's tables, without repetitions."""
        found: list[dict[str, str]] = []
        for content in self.files.values():
            if content.get("part") in OTHER_PAGES:
                continue
            if content["environment"] not in found:
                found.append(content["environment"])
        return found


def read_all(folder: Path) -> list[Device]:
    """What a folder and its subfolders hold, the device with the most measurements first.

    Raises:
        ValueError: a file that says no device.
    """
    devices: dict[str, Device] = {}
    # A device's own folder comes after the files beside it, which are older.
    for path in sorted(folder.rglob("*.json"), key=lambda path: (len(path.parts), path)):
        if "experiments" in path.parts:  # training runs: a form and a report of their own
            continue
        content = json.loads(path.read_text())
        try:
            name = content["environment"]["device"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} must name environment.device") from error
        device = devices.setdefault(name, Device(name))
        device.files[path.relative_to(folder).as_posix()] = content
        rows = content.get("rows", [])
        if rows and "kind" in rows[0]:
            source = path.relative_to(folder).as_posix()
            part = content.get("part", "shapes")
            device.rows += [{**complete(row), "source": source, "part": part} for row in rows]
    return sorted(devices.values(), key=lambda device: -len(device.rows))


def of_results(contents: Iterable[dict[str, Any]]) -> Device:
    """The same for results that have just been measured."""
    device = Device("")
    for number, content in enumerate(contents):
        device.name = content["environment"]["device"]
        device.files[str(number)] = content
        part = content.get("part", "benchmark")
        device.rows += [{**complete(row), "part": part} for row in content["rows"]]
    return device


def complete(row: Row) -> Row:
    """A row with sizes and speed, which older files lack; their batch was 8192 tokens.

    Older files compare an odd V with a product of as many classes, far slower than of a few less:
    their ratios are left out.
    """
    if "tokens" in row:
        odd = row["classes"] % 8 and not row.get("gemm_even")
        return {**row, "gemms": None, "gemm_ms": None} if odd else row
    shape = SHAPES.get(row["test_data"].rsplit("-", 1)[0])
    if shape is None:
        return row
    flop = 2.0 * 8192 * shape.num_classes * shape.dim * PASSES[row["kind"]]
    sizes = {"tokens": 8192, "classes": shape.num_classes, "dim": shape.dim, "ignored": 0.0}
    return {**row, **sizes, "frozen": None, "tflops": flop / row["runtime_ms"] / 1e9}


def gradients_mib(row: Row) -> float:
    """Size of both gradients in the row's dtype (half precision if it does not say)."""
    size = 4 if row.get("dtype") == "float32" else 2
    return float((row["tokens"] + row["classes"]) * row["dim"] * size / 2**20)


def roundings(row: Row, name: str) -> float | None:
    """Error of a gradient as a multiple of what rounding the exact one costs."""
    if row.get(f"rounding_{name}", 0) <= 0 or f"error_{name}" not in row:
        return None
    return float(row[f"error_{name}"] / row[f"rounding_{name}"])


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Without repetitions, in a given order; unknown ones last."""
    known = list(dict.fromkeys(names))
    return sorted(known, key=lambda name: order.index(name) if name in order else len(order))
