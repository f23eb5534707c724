"""The command line of a study of heads."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(
    name: str, choices: Sequence[str], default: Sequence[str]
) -> argparse.Namespace:
    """Parse the command line of the module ``name``.

    Args:
        name: of the study.
        choices: names of made data.
        default: those that are studied if none is named.
    """
    parser = argparse.ArgumentParser(prog=f"python -m research.{name}")
    parser.add_argument("--file", type=Path, help="hidden states of `python -m research.hidden`")
    parser.add_argument("--data", nargs="*", choices=choices, default=default)
    parser.add_argument("--tokens", type=int, default=4096, help="at most that many")
    parser.add_argument("--commit", help="commit to name where there is no history (or COMMIT)")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    return parser.parse_args()
