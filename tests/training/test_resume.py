"""A run that was interrupted and resumed has the losses of one that never was, to the last bit."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import callbacks, checkpoint
from training.checkpoint import list_checkpoints, verify_checkpoint
from training.train import main

ROOT = Path(__file__).resolve().parents[2]


def logged_losses(output: Path) -> list[tuple[str, str]]:
    with (output / "losses.csv").open(encoding="utf-8") as file:
        return [(row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]


def weights(output: Path, step: int = 10) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoints/checkpoint-{step}/model.safetensors")


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


STREAM = ["--streaming", "--shuffle-buffer", "20"]


@pytest.mark.parametrize(
    ("extra", "interrupt"),
    [
        (["--loss", "full"], 4),
        (["--loss", "auto"], 1),
        (["--loss", "chunked"], 9),
        (["--loss", "reference"], 4),
        (["--gradient-accumulation", "3"], 5),
        (["--dtype", "autocast"], 5),
        (["--dtype", "bfloat16", "--gradient-checkpointing"], 5),
        (STREAM, 9),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"after {value}",
)
def test_resumed_losses_are_bit_identical(arguments, tmp_path, extra, interrupt):
    # Ten steps of 8 sequences cross an epoch of 62.
    common = [*arguments, *extra, "--no-export"]
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    assert main([*common, "--steps", str(interrupt)]) == 0
    assert main([*common, "--resume"]) == 0
    whole, parts = logged_losses(tmp_path / "whole"), logged_losses(tmp_path / "run")
    assert len(whole) == 10
    assert parts == whole
    assert float(whole[-1][0]) < float(whole[0][0]) - 0.5
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_the_generator_matters(arguments, tmp_path, monkeypatch):
    """The model has dropout: a resume that forgets the generator would show in the test above."""
    common = [*arguments, "--no-export"]
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    assert main([*common, "--steps", "4"]) == 0
    monkeypatch.setattr("transformers.Trainer._load_rng_state", lambda *_: None)
    assert main([*common, "--resume"]) == 0
    assert logged_losses(tmp_path / "run") != logged_losses(tmp_path / "whole")


def test_command_line_resumes(arguments, tmp_path, capsys):
    assert main([*arguments, "--steps", "6"]) == 0
    assert (tmp_path / "run/model/config.json").is_file()
    assert main([*arguments, "--resume"]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == [
        "checkpoint-8",
        "checkpoint-10",
    ]
    assert main([*arguments, "--resume", str(tmp_path / "run/checkpoints/checkpoint-8")]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_signal_saves_and_the_rest_is_bit_identical(arguments, tmp_path, number):
    whole = [*arguments, "--output", str(tmp_path / "whole"), "--no-export"]
    assert main(whole) == 0
    stopped = [*arguments, "--steps", "1000000", "--checkpoint-interval", "1000000"]
    start = {signal.SIGTERM: ["training/train.py"], signal.SIGINT: ["-m", "training.train"]}
    with subprocess.Popen(
        [sys.executable, *start[number], *stopped],
        cwd=ROOT,
        # DeepSpeed, where it is installed, would announce its accelerator.
        env={k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        before = []
        for line in process.stdout:
            before.append(line)
            if line.startswith("step 2:"):
                break
        process.send_signal(number)
        rest, errors = process.communicate()
    assert before[0].startswith("model:")
    # No library has anything to say, but bitsandbytes of a kernel that it misses on CPUs.
    assert not [x for x in errors.splitlines() if "gemm_4bit_forward" not in x]
    assert process.returncode == 128 + number
    assert f"{number.name} at step" in rest
    assert "--resume" in rest

    (saved,) = list_checkpoints(tmp_path / "run/checkpoints")
    verify_checkpoint(saved)
    done = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    assert done >= 2
    steps = max(10, done + 1)
    assert main([*arguments, "--resume", "--no-export", "--steps", str(steps)]) == 0
    # The subprocess may have had time for more than the ten steps of the whole run.
    assert logged_losses(tmp_path / "run")[:10] == logged_losses(tmp_path / "whole")


def test_a_second_signal_acts_at_once():
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs start with it ignored
    with callbacks.Interrupts() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_refuses_other_settings_and_other_data(arguments, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("What has been read before. " * 30, encoding="utf-8")
    common = [*arguments, "--data", str(data), "--no-export"]
    assert main([*common, "--steps", "1"]) == 0
    assert main([*common, "--resume", "--learning-rate", "1.0"]) == 2
    assert "--learning-rate must be 0.01, as in the run that is resumed" in capsys.readouterr().err
    data.write_text("What has been read after.  " * 30, encoding="utf-8")
    assert main([*common, "--resume"]) == 2
    assert "gives other tokens than in the run that is resumed" in capsys.readouterr().err


def test_falling_schedule_fixes_the_number_of_steps(arguments, capsys):
    common = [*arguments, "--schedule", "cosine", "--no-export"]
    assert main([*common, "--steps", "4"]) == 0
    assert main([*common, "--steps", "6", "--resume"]) == 2
    assert "--steps must be 4" in capsys.readouterr().err


def test_a_run_does_not_write_over_another(arguments, capsys):
    assert main([*arguments, "--steps", "1", "--no-export"]) == 0
    assert main(arguments) == 2
    assert "pass --resume" in capsys.readouterr().err


def test_no_checkpoint_to_resume(arguments, capsys):
    assert main([*arguments, "--resume"]) == 2
    assert "--resume: there is no checkpoint in" in capsys.readouterr().err
    assert main([*arguments, "--resume", "/no/such/folder"]) == 2
    assert "there is no checkpoint /no/such/folder" in capsys.readouterr().err


def test_damaged_checkpoint_ends_a_resume(arguments, tmp_path, capsys):
    assert main([*arguments, "--no-export"]) == 0
    newest = tmp_path / "run/checkpoints/checkpoint-10"
    (newest / "optimizer.pt").write_bytes(b"nothing")
    assert main([*arguments, "--resume", "--steps", "12"]) == 2
    message = capsys.readouterr().err
    assert f"{newest} is damaged: optimizer.pt" in message
    assert "checkpoint-8" in message


@pytest.mark.parametrize("writer", ["safetensors", "torch", "manifest"])
def test_full_disk_ends_the_run_and_keeps_the_checkpoint(
    arguments, tmp_path, capsys, monkeypatch, writer
):
    assert main([*arguments, "--steps", "4", "--no-export"]) == 0
    before = tmp_path / "run/checkpoints/checkpoint-4"
    with monkeypatch.context() as patch:

        def full_disk(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        if writer == "safetensors":
            patch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
        elif writer == "torch":
            patch.setattr(torch, "save", full_disk)
        else:
            patch.setattr(checkpoint, "_sync", full_disk)
        assert main([*arguments, "--resume"]) == 1
    assert f"No space left on device; the checkpoint {before} is intact" in capsys.readouterr().err
    assert list((tmp_path / "run/checkpoints").iterdir()) == [before]
    verify_checkpoint(before)
    assert main([*arguments, "--resume", "--no-export"]) == 0


def test_not_a_number_stops_before_it_is_saved(arguments, tmp_path, capsys):
    # Between two lines of the log, and with the first checkpoint after it.
    changed = ["--learning-rate", "1e30", "--warmup-steps", "0", "--log-interval", "100"]
    assert main([*arguments, *changed]) == 1
    assert "of step 4, or of one since the last line, is" in capsys.readouterr().err
    assert not list_checkpoints(tmp_path / "run/checkpoints")
