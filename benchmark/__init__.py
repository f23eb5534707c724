"""The benchmark by its short name, from the root of a checkout: ``python -m benchmark``."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "cut_cross_entropy" / "benchmark")]
