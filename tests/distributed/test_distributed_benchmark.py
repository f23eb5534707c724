"""``benchmark.distributed`` in processes on a CPU, and the tables of what it writes."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist

from cut_cross_entropy.benchmark import distributed
from cut_cross_entropy.benchmark.data import Problem
from cut_cross_entropy.benchmark.distributed import Job, jobs_of, measure_or_note, parse_arguments
from docs import benchmark_runs, distributed_runs
from tests.distributed.processes import fork_processes

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--data", "small", "--impl", "chunked", "--repetitions", "2"]


def launch_two(folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "benchmark.distributed", *SMALL, "--commit", "abc"]
    done = subprocess.run(
        [*command, *arguments, "--json", str(folder)],
        cwd=ROOT,
        env={**distributed.os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_alone(folder, *arguments):
    """The same in one process, which starts faster without torchrun; return what it wrote."""
    fork_processes(_alone, (str(folder), [*SMALL, "--commit", "abc", *arguments]), 1)
    return json.loads((folder / "distributed_1.json").read_text())


def _alone(rank, folder, arguments):
    sys.argv = ["benchmark.distributed", *arguments, "--json", folder]
    torch.set_num_threads(1)
    dist.init_process_group = functools.partial(
        dist.init_process_group, store=dist.HashStore(), rank=0, world_size=1
    )
    distributed.main()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the files of one process and of two."""
    folder = tmp_path_factory.mktemp("measurements")
    setups = ["vocabulary-parallel", "FSDP2", "HSDP, DTensor", "tensor-parallel full logits"]
    launch_two(folder / "cpu", "--tokens", "16", "--setups", *setups, "--compare", "reference")
    run_alone(folder / "cpu", "--tokens", "16", "32", "--compare")
    return folder


def test_every_row_is_there_and_complete(measured):
    record = json.loads((measured / "cpu" / "distributed_2.json").read_text())
    assert record["part"] == "distributed"
    assert record["environment"]["commit"] == "abc"
    assert record["skipped"] == []
    assert set(record["links"]) == {"all_reduce", "all_gather", "reduce_scatter"}
    assert [(row["setup"], row["impl"]) for row in record["rows"]] == [
        ("vocabulary-parallel", "chunked"),
        ("FSDP2", "chunked"),
        ("HSDP, DTensor", "chunked"),
        ("tensor-parallel full logits", "reference"),
        ("vocabulary-parallel", "reference"),
        ("FSDP2", "reference"),
    ]
    for row in record["rows"]:
        assert "why" not in row
        assert row["ms"] > 0
        if row["setup"] != "HSDP, DTensor":  # whose collectives are not those of all processes
            assert min(row["alone_ms"], row["exchange_ms"], row["sent_mib"]) > 0
    assert record["rows"][1]["sent_mib"] == 3 * 16384 * 256 * 4 / 2 / 2**20


def test_page_of_measurements(measured):
    page = distributed_runs.page(benchmark_runs.read(measured).parts("distributed"))
    assert "### 2 GPUs: " in page
    assert "### One GPU, for comparison: " in page
    assert "commit abc." in page
    assert "| small | 16 | FSDP2, `chunked` | " in page
    assert "| small | 32 | one GPU, `chunked` | " in page
    assert page.endswith("Not measured yet: 4 and 8 GPUs.\n")
    assert distributed_runs.page([]) == ""


def test_no_row_begins_after_the_limit(tmp_path):
    record = run_alone(tmp_path, "--tokens", "16", "--time-limit", "0", "--compare")
    assert record["rows"] == []
    assert [job["setup"] for job in record["skipped"]] == ["one GPU", "one GPU, full logits"]
    page = distributed_runs.page(benchmark_runs.read(tmp_path).parts("distributed"))
    assert "No time was left for: small, 16 tokens, one GPU, `chunked`; small" in page


def row(setup, **more):
    return {
        "data": "gemma2", "tokens": 8192, "setup": setup, "impl": "cce", "processes": 2, "ms": 25.0,
        "alone_ms": 20.0, "exchange_ms": 10.0, "sent_mib": 1e3, "peak_mib": 2e3, **more,
    }  # fmt: skip


def test_efficiency_and_hidden_share():
    rows = [row("FSDP2"), row("vocabulary-parallel"), row("FSDP2", impl="cce_exact", alone_ms=None)]
    several = distributed_runs.rows_of(rows)
    alone = [row("one GPU", ms=20.0), row("one GPU, full logits", ms=9.0)]
    one = distributed_runs.rows_of(alone)
    found = distributed_runs.with_efficiency(several, one)
    assert found["efficiency"].tolist()[:2] == [0.8, 0.4]
    assert pd.isna(found["efficiency"].iloc[2]), "one GPU was not measured with that implementation"
    assert found["hidden"].tolist()[:2] == [0.5, 0.5]
    assert pd.isna(found["hidden"].iloc[2])
    short = distributed_runs.rows_of([row("FSDP2", exchange_ms=2.4)])
    found = distributed_runs.with_efficiency(short, None)
    assert found[["efficiency", "hidden"]].isna().all(axis=None)


def test_what_does_not_fit_is_said():
    nothing = dict.fromkeys(distributed.FIGURES)
    large = row("tensor-parallel full logits", tokens=32768, **nothing, why="out of memory")
    record = {
        "part": "distributed", "processes": 2, "links": {}, "skipped": [],
        "environment": {"device": "Some GPU", "torch": "2", "triton": "3", "commit": "abc"},
        "rows": [large, row("FSDP2", alone_ms=None, exchange_ms=None, why="RuntimeError: no")],
    }  # fmt: skip
    page = distributed_runs.page([record])
    assert (
        "| Gemma 2 2B | 32,768 | tensor-parallel full logits | out of memory |  |  |  |  |  |  |"
        in page
    )
    assert "Gemma 2 2B, 8,192 tokens, FSDP2, `cce`: incomplete, RuntimeError: no" in page


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("72 GiB"), "out of memory"),
        (ValueError("no such thing\nsecond line"), "ValueError: no such thing"),
    ],
)
def test_a_row_that_fails_keeps_what_it_has(error, why, monkeypatch):
    given = []

    def fails(job, problem, repetitions, row):
        given.append(problem.e.shape[0])
        row["ms"] = 3.0
        raise error

    monkeypatch.setattr(distributed, "measure", fails)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 4)
    problem = Problem(torch.ones(64, 2), torch.ones(8, 2), torch.zeros(64, dtype=torch.int64))
    for setup in ("FSDP2", "vocabulary-parallel"):
        row = measure_or_note(Job("small", 8, setup, "chunked"), problem, 2)
        assert (row["ms"], row["alone_ms"], row["why"]) == (3.0, None, why)
    assert given == [32, 8]


def test_what_matters_most_comes_first():
    jobs = jobs_of(parse_arguments([]), 2)
    assert len(jobs) == 2 * 2 * 6 + 4
    assert jobs[0].setup == "vocabulary-parallel"
    assert {job.tokens for job in jobs[:12]} == {8192}
    assert [job.impl for job in jobs[-6:]] == ["cce_exact"] * 4 + ["reference"] * 2
    assert [job.tokens for job in jobs[-2:]] == [32768] * 2
    alone = jobs_of(parse_arguments([]), 1)
    assert {job.setup for job in alone} == {"one GPU", "one GPU, full logits"}
