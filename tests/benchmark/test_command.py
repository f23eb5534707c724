"""``python -m benchmark`` from the command line to its files, on a CPU."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cut_cross_entropy.benchmark import output, worker
from cut_cross_entropy.benchmark.__main__ import chosen_methods, main, parse_arguments, tasks
from cut_cross_entropy.benchmark.pool import WorkerError
from cut_cross_entropy.benchmark.shapes import SHAPES
from docs import make


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny sweep with everything that can be written."""
    folder = tmp_path_factory.mktemp("benchmark")
    saved = {
        "e": torch.randn(40, 16).bfloat16(),
        "c": torch.randn(300, 16).bfloat16(),
        "t": torch.randint(300, (40,)),
    }
    torch.save(saved, folder / "saved.pt")
    main(
        [
            *("--data", "gemma2", "file", "--file", str(folder / "saved.pt")),
            *("--tokens", "16", "32", "64", "--classes", "384", "--ignored", "0.5"),
            *("--methods", "chunked", "baseline", "--repetitions", "2", "--commit", "abc"),
            *("--json", str(folder / "rows.json"), "--csv", str(folder / "rows.csv")),
        ]
    )
    return folder


@pytest.fixture(scope="module")
def results(written):
    return json.loads((written / "rows.json").read_text())


def test_every_method_and_kind_has_a_row(results):
    assert results["failures"] == []
    assert results["environment"]["commit"] == "abc"
    assert results["environment"]["torch"] == torch.__version__
    found = {(row["test_data"], row["method"], row["kind"]) for row in results["rows"]}
    names = {f"small-broad-V384-N{n}-ignored0.5" for n in (16, 32, 64)} | {"saved-ignored0.5"}
    kinds = {"loss-fw", "loss-bw", "loss-fw-bw"}
    assert found == {(n, m, k) for n in names for m in ("chunked", "baseline") for k in kinds}
    assert len(results["rows"]) == len(found)


def test_rows_are_complete_and_plausible(results):
    for row in results["rows"]:
        assert set(output.COLUMNS) <= set(row)
        assert row["runtime_ms"] > 0
        assert row["q1_ms"] <= row["runtime_ms"] <= row["q3_ms"]
        assert row["repetitions"] == 2
        assert row["gemms"] == pytest.approx(row["runtime_ms"] / row["gemm_ms"])
        assert row["tflops"] > 0
        assert row["op_mem_mb"] > 0
        assert row["ignored"] == 0.5
        assert max(row["error_e"], row["error_c"]) < 1e-5  # float32 against float32
        assert row["loss_error"] < 1e-5


def test_only_the_first_problem_is_a_cold_start(results):
    for row in results["rows"]:
        assert row["cold"] == (row["test_data"] == results["rows"][0]["test_data"])


def test_csv_says_the_same_as_json(written, results):
    with (written / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0])[:5] == output.COLUMNS
    assert [float(line["runtime_ms"]) for line in lines] == [
        row["runtime_ms"] for row in results["rows"]
    ]
    assert {line["commit"] for line in lines} == {"abc"}


def test_what_was_measured_can_be_plotted(written, capsys):
    folder = written / "plots"
    assert make.main([str(written / "rows.json"), "--plots", str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    assert {"sweep_tokens.png", "bars_saved-ignored0.5.png"} <= names
    assert "| saved-ignored0.5 | `chunked` | " in capsys.readouterr().out


def test_table_has_the_published_columns(results):
    lines = output.table(results["rows"]).splitlines()
    assert lines[0].split()[:5] == ["method", "kind", "runtime_ms", "op_mem_mb", "test_data"]
    assert len(lines) == len(results["rows"]) + 1
    assert len({len(line) for line in lines}) == 1


def test_a_cpu_says_what_it_measures_instead_and_rows_as_they_come(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--data", "gpt2", "--tokens", "16", "--classes", "384", "--repetitions", "1"]
    main([*arguments, "--methods", "chunked", "baseline", "--no-errors", "--one-process"])
    out, err = capsys.readouterr()
    assert "Sizes are reduced: instead of gpt2 a small classifier, V 384, D 256,\n" in out
    assert "with N 16 tokens." in out
    sizes = "small-broad-V384: N 16, V 384, D 256, float32"
    assert out.count(sizes) == 3, "each kind of pass has its rows at once"
    assert "chunked needs more memory than full logits here" in out
    for kind in ("loss-fw", "loss-bw", "loss-fw-bw"):
        assert f"small-broad-V384: {kind}, 1 round of 3 methods, about " in err
    assert all(line.startswith("[") for line in err.splitlines() if "small-broad" in line)


def test_the_note_on_memory_is_there_only_if_it_is_true():
    row = {"tokens": 64, "dim": 256, "kind": "loss-fw-bw"}
    rows = lambda chunked: [
        {**row, "method": "chunked", "op_mem_mb": chunked},
        {**row, "method": "baseline", "op_mem_mb": 20.0},
    ]
    assert "With N 64 and D 256" in output.memory_note(rows(52.0))
    assert output.memory_note(rows(20.0)) == ""
    assert output.memory_note(rows(52.0)[:1]) == ""
    assert output.memory_note([{**each, "kind": "loss-fw"} for each in rows(52.0)]) == ""


def test_methods_in_one_process_share_data_and_reference(monkeypatch, tmp_path, capsys):
    made, references = [], []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, seen in (("make", made), ("exact_gradients", references)):
        function = getattr(worker, name)
        monkeypatch.setattr(
            worker, name, lambda *a, f=function, s=seen, **o: s.append(1) or f(*a, **o)
        )
    command = ["--data", "gemma2", "--tail", "broad", "flat", "--classes", "300", "--tokens", "32"]
    command += ["--methods", "chunked", "chunked_1gib", "baseline", "--repetitions", "2"]
    command += [
        "--kinds",
        "loss-fw-bw",
        "--dtype",
        "float64",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    main([*command, "--one-process"])
    results = json.loads((tmp_path / "rows.json").read_text())
    assert (len(made), len(references), results["failures"]) == (2, 2, [])
    found = {(row["test_data"], row["method"]): row for row in results["rows"]}
    assert len(found) == 6
    assert all(row["error_c"] < 1e-5 and not row["cold"] for row in found.values())
    assert {row["dtype"] for row in found.values()} == {"float64"}
    assert ("small-flat-V300-float64", "chunked_1gib") in found


def test_a_failure_in_the_one_process_takes_that_method_out_of_the_problem():
    here = worker.Here("quack")
    shape = {"name": "tiny", "num_classes": 16, "dim": 8, "softcap": 3.0}
    with pytest.raises(WorkerError, match="ValueError: quack has no softcap"):
        here.ask("load", 9.0, kind="flat", tokens=4, shape=shape, dtype="float32")
    with pytest.raises(WorkerError, match="no time was left"):
        here.ask("time", 0.0, kind="loss-fw", count=1)
    assert here.alive


def test_sweeps_and_options_make_problems():
    swept = tasks(parse_arguments(["--sweep", "classes", "--data", "llama3.2-1b"]), on_gpu=True)
    assert [task.shape.num_classes for task in swept] == [
        32768,
        65536,
        98304,
        131072,
        196608,
        262144,
    ]
    assert all(task.kinds == ["loss-fw-bw"] and not task.errors for task in swept)
    both = tasks(parse_arguments(["--data", "all", "--frozen", "none", "c"]), on_gpu=True)
    assert len(both) == 2 * len(SHAPES)
    assert len({task.name for task in both}) == len(both)


def test_a_cpu_runs_what_runs_on_a_cpu():
    arguments = parse_arguments(["--peer", "apple=somewhere"])
    assert "apple" in chosen_methods(arguments, on_gpu=True)
    on_cpu = chosen_methods(arguments, on_gpu=False)
    assert on_cpu[0] == "gemm"
    assert not {"apple", "cce", "cce_exact"} & set(on_cpu)
    assert {task.shape.name for task in tasks(arguments, on_gpu=False)} == {"small"}
    arguments.methods = []
    assert chosen_methods(arguments, on_gpu=True) == ["gemm"]


def test_heads_of_real_models_come_first_where_there_is_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = lambda *arguments: [task.name for task in tasks(parse_arguments(arguments), True)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert names() == ["gemma2-broad"]
    Path("out/heads").mkdir(parents=True)
    for name in ("smollm2.pt.xz", "gemma3-270m.pt"):
        Path("out/heads", name).touch()
    assert names() == ["gemma3-270m", "smollm2", "gemma2-broad"]
    assert names("--data", "phi3.5", "--tail", "structured") == ["phi3.5-structured"]
    assert names("--data", "file", "--file", "else/one.pt") == ["one"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert names() == ["gemma2-broad"], "too large for a CPU, unless they are asked for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "file"], "--data file needs --file, or files in out/heads"),
        (["--peer", "apple"], "--peer must be METHOD=PATH"),
        (["--peer", "cce=x"], "--peer names no other package: cce"),
        (["--data", "gpt5"], "invalid choice: 'gpt5'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_the_short_name_works_from_the_root_of_a_checkout():
    """And the package holds the command, so that a wheel brings no other top-level name."""
    command = [sys.executable, "-m", "benchmark", "--help"]
    done = subprocess.run(command, cwd=make.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m benchmark")
    short = importlib.import_module("benchmark.suite")
    assert Path(short.__file__) == make.ROOT / "cut_cross_entropy/benchmark/suite.py"
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((make.ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {
        "cce-benchmark": "cut_cross_entropy.benchmark.__main__:main"
    }
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["cut_cross_entropy*"]
