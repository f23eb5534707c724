"""``python -m cut_cross_entropy`` tells what can run, and why not."""

import subprocess
import sys

import pytest
import torch

import cut_cross_entropy
from cut_cross_entropy import __main__ as report
from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.options import ALL_IMPLS


def test_command():
    command = [sys.executable, "-m", "cut_cross_entropy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"cut-cross-entropy  {cut_cross_entropy.__version__}"
    assert any(
        line.startswith("torch ") and torch.__version__.split("+")[0] in line for line in lines
    )
    assert any(line.startswith("cpu: ") for line in lines)
    again = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == cut_cross_entropy.__version__


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_what_is_said_of_the_cpu_is_so(monkeypatch, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    cpu = torch.device("cpu")
    reasons = {name: reason for names, reason in report.implementations(cpu) for name in names}
    assert set(reasons) == set(ALL_IMPLS)
    e, c, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for name, reason in reasons.items():
        if reason is None:
            linear_cross_entropy(e, c, targets, impl=name)
            continue
        with pytest.raises(RuntimeError, match="cannot run"):
            linear_cross_entropy(e, c, targets, impl=name)
    assert (reasons["cce"] is None) == (interpret == "1")
    text = "\n".join(report.report())
    assert "  auto, in half precision: chunked\n" in text
    assert ("cannot run" in text) == (interpret == "0")


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package    not installed" in list(report.report())
