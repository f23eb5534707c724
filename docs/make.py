"""Make the tables and plots of the documentation from the measurements that are kept.

    python docs/make.py            # all of them
    python docs/make.py --check    # write nothing; fail if one is stale
    python docs/make.py out/*.json --plots out    # of files that were just measured

Reads every JSON file under ``docs/measurements``, writes the blocks between the markers
``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of the pages, and the PNGs in ``docs/images``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # started by its path: Python then puts this folder first, not the root
    sys.path[0] = str(ROOT)

from docs import (  # noqa: E402
    aims,
    benchmark_runs,
    distributed_runs,
    evidence_tables,
    exact_aims,
    post_training_runs,
    training_runs,
)
from docs.benchmark_runs import Measurements  # noqa: E402
from docs.page import fill  # noqa: E402
from research import compare_processes, figures  # noqa: E402

PAGES = tuple(
    Path(page)
    for page in ("README.md", "docs/benchmarks.md", "docs/numerics.md", "docs/distributed.md",
                 "docs/training.md", "docs/experiments.md", "docs/evidence.md",
                 "docs/post_training.md")
)  # fmt: skip


def training_processes(kept: Measurements) -> str:
    """One training in one process and in several."""
    return "\n".join(map(compare_processes.table, kept.parts(compare_processes.PART)))


def arguments(_: Measurements) -> str:
    """Arguments of the training script."""
    from training.arguments import build_parser
    from training.arguments import table as of_parser

    return of_parser(build_parser())


BLOCKS = {
    **benchmark_runs.BLOCKS,
    **post_training_runs.BLOCKS,
    **exact_aims.BLOCKS,
    **figures.BLOCKS,
    "aims": aims.aims,
    "distributed": lambda kept: distributed_runs.page(kept.parts("distributed")),
    "training-processes": training_processes,
    "arguments": arguments,
}


def pages(root: Path, kept: Measurements, runs: training_runs.Records) -> dict[Path, str]:
    """Return the text that every page should have, by its path below ``root``.

    Raises:
        ValueError: a marker without its other half, or a block that nobody makes.
    """
    blocks = {name: partial(make, kept) for name, make in BLOCKS.items()}
    folder = root / "docs/measurements"
    blocks |= {
        name: partial(make, kept, runs, folder) for name, make in evidence_tables.BLOCKS.items()
    }
    blocks |= {
        name.replace("/", "-"): partial(training_runs.section, name, runs)
        for name in training_runs.NAMES
    }
    trl = post_training_runs.read(folder / "experiments")
    blocks |= {name: partial(post_training_runs.section, name, trl) for name in ("grpo", "dpo")}
    return {page: fill((root / page).read_text(encoding="utf-8"), blocks) for page in PAGES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 done, 1 stale (with ``--check``), 2 wrong input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="JSON files to show instead")
    parser.add_argument("--plots", type=Path, help="folder for the plots of FILES")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--check", action="store_true", help="fail if something is stale")
    parsed = parser.parse_args(argv)
    try:
        if parsed.files:
            show(parsed.files, parsed.plots)
            return 0
        kept = benchmark_runs.read(parsed.root / "docs/measurements")
        runs = training_runs.read(parsed.root / "docs/measurements/experiments")
        made = pages(parsed.root, kept, runs)
    except (ValueError, OSError) as error:
        print(f"make.py: error: {error}", file=sys.stderr)
        return 2
    folder = parsed.root / "docs/images"
    drawn = [*benchmark_runs.plots_of(kept), *figures.plots_of(kept), *training_runs.plots_of(runs)]
    old_pages = [p for p, text in made.items() if text != (parsed.root / p).read_text("utf-8")]
    old_plots = [plot for plot in drawn if not plot.is_current(folder)]
    if parsed.check:
        names = [str(page) for page in old_pages] + [f"docs/images/{p.name}.png" for p in old_plots]
        if names:
            print(f"stale, run python docs/make.py: {', '.join(names)}", file=sys.stderr)
        return int(bool(names))
    for page in old_pages:
        (parsed.root / page).write_text(made[page], encoding="utf-8")
        print(page)
    for plot in old_plots:
        print(plot.save(folder))
    return 0


def show(paths: Sequence[Path], folder: Path | None) -> None:
    """Print the tables of some files, and draw their plots into ``folder``."""
    kept = benchmark_runs.collect(
        {str(path): json.loads(path.read_text(encoding="utf-8")) for path in paths}
    )
    made = benchmark_runs
    names = list(dict.fromkeys(kept.rows["test_data"]))
    texts = (made.where(kept), made.by_problem(kept, names), made.filter_table(kept))
    print(*texts, made.failures(kept), sep="\n\n")
    for plot in made.plots_of(kept) if folder else []:
        print(plot.save(folder))


if __name__ == "__main__":
    sys.exit(main())
