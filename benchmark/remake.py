"""``python -m benchmark.remake``: the tables and plots of the documentation, from what is kept.

Reads every JSON file under ``docs/measurements``, writes the blocks between the markers
``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of the documentation and the README, and the
pictures in ``docs/images``. ``--check`` writes nothing and fails if something is stale.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark import cells, distributed_model, distributed_tables, evidence, report
from benchmark.drawings import strips_and_tail
from benchmark.plots import Plot, digest_of, plots_of, ranks
from benchmark.results import Device, in_order, read_all, roundings

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/numerics.md",
    "docs/distributed.md",
    "docs/training.md",
)
NOTHING = "Not measured yet.\n"


@dataclass(frozen=True)
class Measurements:
    """What the blocks are made of.

    Args:
        devices: all of them, the one with the most measurements first.
    """

    devices: list[Device]

    @property
    def main(self) -> Device:
        """The device that the documentation is about."""
        return self.devices[0]

    def part(self, name: str) -> tuple[dict, Device] | None:
        """A file with a form of its own, from whichever device has it."""
        for device in self.devices:
            content = device.data_of(name)
            if content is not None:
                return content, device
        return None

    def problems(self, *parts: str) -> list[str]:
        """Names of the problems in some parts of the main device."""
        return in_order([r["test_data"] for r in self.main.rows if r["part"] in parts], [])


def table_one(found: Measurements) -> str:
    """The paper's Table 1."""
    text = report.all_kinds(found.main.select(test_data="gemma2-structured"))
    return text + picture(found, "bars_gemma2-structured", "Time and memory of all methods")


def picture(found: Measurements, name: str, text: str) -> str:
    """A link to a picture if there are measurements for it."""
    names = [plot.name for plot in plots_of(found.main)]
    return f"\n![{text}](images/{name}.png)\n" if name in names else ""


def sweep(found: Measurements, size: str) -> str:
    """Time per token or class as a table and a picture."""
    text = "Time and memory against the size"
    return evidence.sweep(found.main, size) + picture(found, f"sweep_{size}", text)


def shapes(found: Measurements) -> str:
    """Our kernels on all shapes."""
    names = [name for name in found.problems("table", "shapes") if not name.startswith("smol")]
    return report.by_problem(found.main, names, ("cce", "cce_exact"))


def all_methods(found: Measurements) -> str:
    """Every method on the problems that were measured with all."""
    names = [name for name in found.problems("table") if name != "gemma2-structured"]
    return report.by_problem(found.main, names, cells.ORDER)


def tails(found: Measurements) -> str:
    """Other kinds of data."""
    return report.by_problem(found.main, found.problems("tails"), cells.ORDER)


def other_devices(found: Measurements) -> str:
    """Whatever was measured elsewhere."""
    text = ""
    for device in found.devices[1:]:
        names = in_order([row["test_data"] for row in device.rows], [])
        if names:
            text += f"### {device.name}\n\n{cells.where(device)}\n\n"
            text += report.by_problem(device, names, cells.ORDER) + "\n"
            text += report.filter_table(device) + "\n"
    return text


def files(found: Measurements) -> str:
    """Every file, and where it comes from."""
    lines = []
    for device in found.devices:
        for name, content in device.files.items():
            where = content["environment"]
            lines.append(
                (
                    f"[{name}](measurements/{name})",
                    where["device"],
                    where["torch"],
                    where["triton"],
                    where["commit"],
                    str(len(content.get("rows", content.get("curves", [])))),
                )
            )
    return cells.markdown(("file", "device", "PyTorch", "Triton", "commit", "rows"), lines)


def largest(found: Measurements) -> str:
    """Largest batches."""
    part = found.part("largest")
    return evidence.largest(part[0]) if part else ""


def parts(found: Measurements) -> str:
    """What each part buys."""
    part = found.part("simulate")
    return evidence.parts(part[0], part[1] if part[1].rows else found.main) if part else ""


def rank_sentence(found: Measurements) -> str:
    """The rank curve in words."""
    part = found.part("ranks")
    if part is None:
        return ""
    return "".join(
        f"{cells.data_title(name)}, {curve['tokens']:,} tokens: on average "
        f"{curve['above_cutoff']:.0f} of {curve['classes']:,} classes lie above the cut-off, and "
        f"they hold {curve['mass_above_cutoff']:.1%} of the probability.\n"
        for name, curve in part[0]["curves"].items()
    )


def errors_sentence(found: Measurements) -> str:
    """The range of the errors of our default."""
    rows = found.main.select(method="cce", kind="loss-fw-bw")
    text, problems = [], 0
    for name in "ec":
        values = [value for row in rows if (value := roundings(row, name)) is not None]
        problems = max(problems, len(values))  # of a sweep the times alone are measured
        if values:
            gradient = "dE" if name == "e" else "dC"
            text.append(f"{gradient} {min(values):.1f} to {max(values):.1f}")
    return (
        f"Measured for `cce` on the {found.main.name}, in roundings: " + ", ".join(text)
        + f" ({problems} problems).\n"
    ) if text else ""  # fmt: skip


def headline(found: Measurements) -> str:
    """README: this package and others on one synthetic and one real problem."""
    table = found.main.data_of("table")
    if table is None:
        return ""
    where = table["environment"]
    return f"{report.comparison(found.main)}\n{cells.machine(where)}, commit {where['commit']}.\n"


def training_processes(found: Measurements) -> str:
    """One training in one process and in several."""
    from training.compare_processes import PART, table

    records = [one for device in found.devices for one in device.all_of(PART)]
    return "\n".join(table(record) for record in records)


def arguments(_: Measurements) -> str:
    """Those of the training script."""
    from training.arguments import build_parser, table

    return table(build_parser())


Block = Callable[[Measurements], str]

BLOCKS: dict[str, Block] = {
    "headline": headline,
    "where": lambda found: cells.where(found.main) + "\n",
    "spread": lambda found: evidence.spread(found.main) + "\n",
    "table-1": table_one,
    "all-methods": all_methods,
    "against-others": lambda found: report.against_others(found.main),
    "models": lambda found: report.headline(found.main),
    "shapes": shapes,
    "tails": tails,
    "filter": lambda found: report.filter_table(found.main),
    "cold-starts": lambda found: evidence.cold_starts(found.main),
    "options": lambda found: evidence.options(found.main),
    "sweep-tokens": lambda found: sweep(found, "tokens"),
    "sweep-classes": lambda found: sweep(found, "classes"),
    "largest": largest,
    "parts": parts,
    "ranks": rank_sentence,
    "errors": errors_sentence,
    "failures": lambda found: evidence.failures(found.main) or "Nothing failed.\n",
    "other-devices": other_devices,
    "files": files,
    "distributed": lambda found: distributed_tables.page(found.devices),
    "model-assumptions": lambda found: distributed_model.assumptions(found.devices),
    "model": lambda found: distributed_model.table(found.devices),
    "model-check": lambda found: distributed_model.check(found.devices),
    "training-processes": training_processes,
    "arguments": arguments,
}


def fill(text: str, found: Measurements) -> str:
    """A page with its blocks made anew.

    Raises:
        ValueError: a marker without its other half, or a block that nobody makes.
    """
    begins = re.findall(r"<!-- begin ([\w-]+) -->", text)
    ends = re.findall(r"<!-- end ([\w-]+) -->", text)
    if begins != ends:
        raise ValueError(f"markers must come in pairs, got begin {begins} and end {ends}")
    unknown = set(begins) - set(BLOCKS)
    if unknown:
        raise ValueError(f"blocks must be of {', '.join(BLOCKS)}, got {', '.join(unknown)}")
    for name in begins:
        made = BLOCKS[name](found).strip("\n") or NOTHING.strip()
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text


def pictures(found: Measurements) -> list[Plot]:
    """All pictures of the documentation."""
    result = [strips_and_tail(), *plots_of(found.main)]
    part = found.part("ranks")
    return [*result, ranks(part[0])] if part else result


def stale(root: Path, found: Measurements) -> list[str]:
    """Pages and pictures that are not what this command makes."""
    result = []
    for page in PAGES:
        text = (root / page).read_text()
        if fill(text, found) != text:
            result.append(page)
    for plot in pictures(found):
        path = root / "docs" / "images" / f"{plot.name}.png"
        if not path.is_file() or digest_of(path) != plot.digest():
            result.append(path.relative_to(root).as_posix())
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Make them, or check them."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.remake", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--check", action="store_true", help="fail if something is stale")
    parsed = parser.parse_args(arguments)
    found = Measurements(read_all(parsed.root / "docs" / "measurements"))
    if parsed.check:
        old = stale(parsed.root, found)
        if old:
            sys.exit("stale, run python -m benchmark.remake: " + ", ".join(old))
        return
    for page in PAGES:
        path = parsed.root / page
        text = path.read_text()
        path.write_text(fill(text, found))
    folder = parsed.root / "docs" / "images"
    for plot in pictures(found):
        path = folder / f"{plot.name}.png"
        if not path.is_file() or digest_of(path) != plot.digest():
            plot.save(folder)
            print(path)


if __name__ == "__main__":
    main()
