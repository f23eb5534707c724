"""Cells and frames of the Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence

from benchmark.methods import METHODS
from benchmark.results import Device, Row, roundings
from benchmark.shapes import SHAPES

ORDER = list(METHODS)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    text = "| " + " | ".join(header) + " |\n"
    text += "|:---|" + "---:|" * (len(header) - 1) + "\n"
    return text + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def title(method: str) -> str:
    """What a table calls a method."""
    return METHODS[method].title if method in METHODS else f"`{method}`"


def data_title(name: str) -> str:
    """What a table calls a problem."""
    model, _, kind = name.rpartition("-")
    if model in SHAPES:
        return f"{SHAPES[model].title}, {kind}"
    return {"smollm2": "SmolLM2, real text", "smol": "SmolLM2, real text"}.get(name, name)


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A figure, or nothing."""
    return "" if value is None else format(value, form) + unit


def error(row: Row, name: str) -> str:
    """An error in percent, and in roundings of the exact gradient."""
    value = row.get(f"error_{name}")
    if value is None:
        return ""
    multiple = roundings(row, name)
    return f"{value:.2%}" + (f" ({multiple:.1f})" if multiple is not None else "")


def machine(environment: Mapping[str, str]) -> str:
    """The device and the versions."""
    text = "{device}, PyTorch {torch}, Triton {triton}".format_map(environment)
    return f"{text}, Python {environment['python']}" if "python" in environment else text


def where(device: Device) -> str:
    """A sentence: the device, the versions and the commits."""
    commits: dict[str, list[str]] = {}
    for found in device.environments:
        commits.setdefault(machine(found), []).append(found["commit"])
    return "; ".join(
        f"{text}, commit{'s' * (len(names) > 1)} {' and '.join(names)}"
        for text, names in commits.items()
    ) + "."  # fmt: skip
