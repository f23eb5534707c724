"""The JSON file of an experiment: what ran where, and what came out."""

import importlib.metadata
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cut_cross_entropy.benchmark.environment import commit_of_checkout
from cut_cross_entropy.benchmark.output import write_json

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "cut-cross-entropy")


class Record:
    """A result that is on the disk after every run, so that an interrupt loses one run at most.

    Args:
        path: the file; what was there is replaced when the first run ends.
        experiment: its name.
        settings: what decides the numbers.
        data: what identifies the data.
        device: where it runs.
        commit: of the code; None asks the variable COMMIT, then git.
    """

    def __init__(
        self,
        path: Path,
        experiment: str,
        settings: dict[str, Any],
        data: dict[str, Any],
        device: torch.device,
        commit: str | None,
    ) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "experiment": experiment,
            "machine": describe_machine(device, commit),
            "settings": settings,
            "data": data,
            "runs": [],
            "skipped": [],
        }

    def add_run(self, run: dict[str, Any]) -> None:
        """Append one run and write the file."""
        self.content["runs"].append(run)
        self.write()

    def skip(self, run: dict[str, Any], reason: str) -> None:
        """Note a run that did not happen and write the file."""
        self.content["skipped"].append({**run, "reason": reason})
        self.write()

    def write(self) -> None:
        """Write the file in one piece."""
        write_json(self.path, self.content)


class Clock:
    """Says whether another run fits into the time that is left.

    Args:
        limit: seconds from now.
    """

    def __init__(self, limit: float) -> None:
        self.end = time.monotonic() + limit
        self.longest = 0.0

    def fits(self) -> bool:
        """Whether a run as long as the longest so far would end in time."""
        return time.monotonic() + self.longest <= self.end

    def note(self, seconds: float) -> None:
        """Remember how long a run took."""
        self.longest = max(self.longest, seconds)


def describe_machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """GPU or processor, versions, commit and command line."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "commit": commit or commit_of_checkout(),
        "command": " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
