"""Tables of log-probabilities, divergences and TRL's trainers, by hand."""

import json

import pytest

from cut_cross_entropy.benchmark import __main__ as command
from cut_cross_entropy.benchmark.suite import lines_of
from docs import benchmark_runs, post_training_runs
from tests.benchmark.test_documentation import ENVIRONMENT, row


def cells(text, heading):
    """Rows of the table whose heading begins so, as dictionaries."""
    lines = text.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    table = [line for line in lines[start:] if line.startswith("|")]
    split = [[cell.strip() for cell in line[1:-1].split("|")] for line in table]
    return [
        dict(zip(split[0], each, strict=True)) for each in split[2:] if len(each) == len(split[0])
    ]


def kept(*rows):
    command = "python -m benchmark --kinds logprobs-fw --json somewhere/x.json --commit abc"
    old = {"environment": ENVIRONMENT, "command": command, "rows": [row("cce", gemms=9.0)]}
    file = {"environment": ENVIRONMENT, "command": command, "rows": list(rows)}
    return benchmark_runs.collect({"old.json": old, "z.json": file})


BOTH = "logprobs-fw-bw+entropy"
MINE = row("cce", kind=BOTH, gemms=1.6, error_logprobs=1e-6, error_entropy=2e-6)
TRL = row("trl", kind=BOTH, gemms=6.0, runtime_ms=70.0, version="1.16.0", error_logprobs=0.02)


def test_methods_of_a_kind_by_time():
    text = post_training_runs.logprobs(kept(TRL, MINE, row("cce", kind="logprobs-fw+rank")))
    ours, theirs = cells(text, "kind")  # nobody else was timed with ranks
    assert ours["method"] == "`cce`"
    assert ours["× matmul"] == "1.60"
    assert ours["log-probability"] == "1.0e-06"
    assert ours["dE, × rounding"] == "1.9"  # 0.003 / 0.0016
    assert theirs["method"] == "TRL, chunked 1.16.0"
    assert theirs["entropy"] == ""
    assert "commit abc: `python -m benchmark --kinds logprobs-fw`" in text


def test_losses_are_not_among_them_nor_they_among_losses():
    found = kept(MINE, TRL)
    assert set(found.rows["kind"]) == {"loss-fw-bw"}
    assert "9.00" not in post_training_runs.logprobs(found)
    assert post_training_runs.divergences(found) == ""


def test_additions():
    fw, ranks = "logprobs-fw", "logprobs-fw-bw+rank+temperature"
    text = post_training_runs.additions(
        kept(row("cce", kind=fw, gemms=1.1), row("cce", kind=f"{fw}-bw", gemms=1.5),
             row("cce", kind=ranks, gemms=1.7), row("chunked", kind=fw, gemms=8.0))
    )  # fmt: skip
    assert [list(line.values())[1:] for line in cells(text, "data")] == [
        ["log-probability", "1.10", "1.50"],
        ["rank, temperature", "", "1.70"],
    ]


def test_divergences():
    kind = "divergence-fw-bw+jsd"
    text = post_training_runs.divergences(
        kept(row("liger", kind=kind, gemms=20.0, loss_error=1e-3),
             row("cce", kind=kind, gemms=4.0, runtime_ms=1.0, error_divergence=1e-7))
    )  # fmt: skip
    ours, theirs = cells(text, "kind")
    assert (ours["divergence"], ours["mean"]) == ("1.0e-07", "")
    assert (theirs["divergence"], theirs["mean"]) == ("", "1.0e-03")


def test_parts_of_the_suite_fill_the_tables():
    parts = ("logprobs", "additions", "divergences")
    rows = [
        row(method, data=task.name, kind=kind)
        for part in parts
        for line in lines_of(part, [])
        for task in command.tasks(line, True)
        for kind in task.kinds
        for method in line.methods
    ]
    found = kept(*rows)
    assert len(cells(post_training_runs.logprobs(found).split("**Qwen3")[0], "kind")) == 2 * 4
    assert len(cells(post_training_runs.additions(found), "data")) == 6 + 1
    assert len(cells(post_training_runs.divergences(found), "kind")) == 2 * 3


@pytest.mark.parametrize("bf16", [False, True])
def test_runs_of_a_trainer(tmp_path, bf16):
    logs = [{"loss": 0.1 * i, "reward": float(i)} for i in range(10)]
    run = {"seed": 0, "logs": logs, "ms_per_step": {"generation": 9.0, "update": 5.0},
           "peak_mib": {"generation": 100.0, "update": 2000.0}, "calls": 0}  # fmt: skip
    record = {
        "experiment": "grpo_bf16" if bf16 else "grpo",
        "machine": {"device": "Some GPU", "versions": {"trl": "1.16.0"}, "commit": "abc",
                    "date": "2026-11-29", "command": "grpo --bf16 --out x --commit abc"},
        "settings": {"model": "smollm2", "steps": 10, "bf16": bf16},
        "runs": [{**run, "method": "trl"}, {**run, "method": "token_logprobs"}],
        "distances": [{"method": "token_logprobs", "seed": 0, "loss": 1e-5, "equal_steps": 7}],
    }  # fmt: skip
    name = f"{record['experiment']}_h200.json"
    (tmp_path / name).write_text(json.dumps(record))
    text = post_training_runs.section("grpo", post_training_runs.read(tmp_path))
    assert text.count("Some GPU") == 1
    assert text.startswith("**bfloat16 autocast**" if bf16 else "**float32**")
    assert "`python -m experiments.grpo --bf16`" in text
    first = cells(text.split("Largest")[0], "output layer")[0]
    assert first["`reward`, last 8 steps"] == "5.5000"
    assert first["update, ms / peak MiB"] == "5.0 / 2,000"
    (far,) = cells(text.split("steps:")[1], "output layer")
    assert far["`loss`"] == "1.0e-05"
    assert far["equal from the start"] == "7 of 10 steps"
