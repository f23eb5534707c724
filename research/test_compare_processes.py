"""``research/compare_processes.py``: what it starts, reads and says."""

import itertools
import json
import re
import sys

import pytest

from research import compare_processes
from research.compare_processes import (
    SETUPS,
    command,
    differences,
    main,
    parse_arguments,
    read_losses,
    table,
)


def options_of(way, tmp_path, *more):
    parsed = parse_arguments(["--json", "x.json", *more])
    words = command(SETUPS[way], parsed, tmp_path)
    return words, dict(itertools.pairwise(words))


@pytest.mark.parametrize(
    ("way", "processes", "batch", "parts"),
    [
        ("one", None, "8", "1"),
        ("parts", None, "2", "4"),
        ("fsdp2", "4", "2", "1"),
        ("fsdp2-one", "1", "8", "1"),
        ("zero3", "4", "2", "1"),
        ("zero3-one", "1", "8", "1"),
        ("ddp", "4", "2", "1"),
    ],
)
def test_every_run_has_as_many_tokens_a_step(way, processes, batch, parts, tmp_path):
    words, options = options_of(way, tmp_path, "--processes", "4")
    assert options.get("--nproc-per-node") == processes
    assert (options["--batch-size"], options["--gradient-accumulation"]) == (batch, parts)
    assert ("--fsdp" in words) == way.startswith("fsdp2")
    assert options.get("--deepspeed") == ("training/zero3.json" if "zero3" in way else None)
    assert (options["--dtype"], options["--steps"], options["--seed"]) == ("autocast", "50", "0")


def test_a_batch_that_cannot_be_divided_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--json", "x.json", "--batch-size", "3"])
    assert "--batch-size must be a multiple of --processes, got 3" in capsys.readouterr().err


def test_losses_are_read_from_the_table(tmp_path):
    path = tmp_path / "losses.csv"
    assert read_losses(path) == []
    path.write_text("step,loss,eval_loss\n1,2.50000001,\n2,2.25,2.5\n3,,2.4\n")
    assert read_losses(path) == [2.5, 2.25]


ENVIRONMENT = {"device": "GPU", "torch": "2", "triton": "3", "python": "3.12", "commit": "abc"}
SETTINGS = {
    "steps": 3, "batch_size": 8, "sequence_length": 256, "dtype": "autocast", "loss": "auto",
    "learning_rate": 2e-5,
}  # fmt: skip


def record(*rows):
    return {
        "environment": ENVIRONMENT, "versions": {"transformers": "5"}, "settings": SETTINGS,
        "rows": list(rows),
    }  # fmt: skip


def row(name, losses, against=("one GPU",), code=0):
    return {
        "name": name, "against": list(against), "losses": losses, "processes": 2, "exit_code": code,
    }  # fmt: skip


def test_table_compares_every_run_with_its_own():
    one = row("one GPU", [3.0, 2.0, 1.0], ())
    zero3 = row("ZeRO-3", [3.5, 2.0, 1.0], ("one GPU", "ZeRO-3 on one GPU"))
    alone = row("ZeRO-3 on one GPU", [3.5, 2.0, 1.0])
    text = table(record(one, zero3, alone, row("FSDP2", [3.0, 2.5], code=1)))
    assert "| one GPU | 2 | 3.0000 | 1.0000 |  |  |  |  |" in text
    assert "| ZeRO-3 | 2 | 3.5000 | 1.0000 | one GPU | 5.0e-01 | 1.7e-01 | 1.7e-01 |" in text
    assert "|  |  |  |  | ZeRO-3 on one GPU | 0.0e+00 | 0.0e+00 | 0.0e+00 |" in text
    assert "FSDP2: 2 of 3 steps, exit code 1." in text
    assert "Not run: FSDP2 on one GPU, one GPU, the batch in parts, DDP." in text
    assert "GPU, PyTorch 2, Triton 3, Python 3.12, transformers 5, commit abc. 3 steps of" in text


def test_a_run_without_losses_is_compared_with_nothing():
    rows = [row("one GPU", [1.0], ()), row("FSDP2", [])]
    assert list(differences(rows[1], rows)) == []
    assert "| FSDP2 | 2 |  |  |  |  |  |  |" in table(record(*rows))


def test_runs_that_are_done_again_replace_their_own(tmp_path, capsys, monkeypatch):
    fails = [sys.executable, "-c", "raise SystemExit(2)"]
    monkeypatch.setattr(compare_processes, "command", lambda *_: fails)
    path = tmp_path / "record.json"
    start = ["--model", "x", "--json", str(path), "--ways"]
    assert main([*start, "parts", "one", "--commit", "abc"]) == 1
    assert main([*start, "one", "--commit", "def", "--again"]) == 1
    written = json.loads(path.read_text())
    assert written["environment"]["commit"] == "abc"
    parts, one = written["rows"]
    assert parts["name"] == "one GPU, the batch in parts"
    assert "environment" not in parts
    assert one["name"] == "one GPU"
    assert one["environment"] == {**written["environment"], "commit": "def"}
    text = table(written)
    assert "commit def: one GPU." in text
    assert text.index("| one GPU |") < text.index("| one GPU, the batch in parts |")
    wrong = [
        (["--processes", "4"], r"--again needs the settings of .*'processes': 2.*'processes': 4"),
        (["--seed", "1"], r"--again needs the settings of .*'seed': 0.*'seed': 1"),
        (["--json", str(tmp_path / "none.json")], r"--again needs a record in --json, got .*none"),
    ]
    (tmp_path / "broken.json").write_text("{")
    wrong.append((["--json", str(tmp_path / "broken.json")], "--again needs a record in --json"))
    for changed, message in wrong:
        assert main([*start, "one", "--commit", "def", "--again", *changed]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert json.loads(path.read_text()) == written


def test_a_run_that_fails_is_on_record(tmp_path, monkeypatch):
    fails = [sys.executable, "-c", "raise SystemExit('there is no such file')"]
    monkeypatch.setattr(compare_processes, "command", lambda *_: fails)
    path = tmp_path / "record.json"
    assert main(["--ways", "one", "--json", str(path)]) == 1
    (only,) = json.loads(path.read_text())["rows"]
    assert only["exit_code"] == 1
    assert only["losses"] == []
    assert "there is no such file" in only["output"]


def test_a_run_that_takes_too_long_keeps_the_losses_it_has(tmp_path, monkeypatch):
    program = (
        "import pathlib, sys, time; folder = pathlib.Path(sys.argv[1])\n"
        "(folder / 'losses.csv').write_text('step,loss\\n1,2.5\\n'); time.sleep(60)"
    )
    monkeypatch.setattr(
        compare_processes, "command", lambda *given: [sys.executable, "-c", program, str(given[2])]
    )
    path = tmp_path / "record.json"
    assert main(["--ways", "one", "parts", "--time-limit", "1", "--json", str(path)]) == 1
    (only,) = json.loads(path.read_text())["rows"]
    assert only["exit_code"] is None
    assert only["losses"] == [2.5]
