"""A run that was interrupted and resumed has the losses of one that never was, to the last bit."""

import csv
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cut_cross_entropy.transformers import is_patched
from training import train
from training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from training.train import main, set_up

ROOT = Path(__file__).resolve().parents[2]


def losses(trainer):
    return [record["loss"] for record in trainer.log]


def run_steps(trainer, steps):
    while trainer.step < steps:
        trainer.train_step()
    return losses(trainer)


def logged_losses(output: Path) -> list[str]:
    with (output / "losses.csv").open(encoding="utf-8") as file:
        return [row["loss"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("loss", ["full", "auto", "chunked", "reference"])
@pytest.mark.parametrize("interrupt", [1, 4, 9], ids="after_{}".format)
def test_resumed_losses_are_bit_identical(config, tmp_path, loss, interrupt):
    config = dataclasses.replace(config, loss=loss)
    trainer, _ = set_up(config, tmp_path / "none", None)
    expected = run_steps(trainer, 10)

    trainer, _ = set_up(config, tmp_path / "some", None)
    run_steps(trainer, interrupt)
    train.save_checkpoint(tmp_path / "some", trainer.step, trainer.state(), keep=1)
    del trainer
    resumed, _ = set_up(config, tmp_path / "some", "latest")
    assert resumed.step == interrupt
    assert is_patched(resumed.model) is (loss != "full")
    assert run_steps(resumed, 10) == expected


def test_dropout_makes_the_generator_matter(config, tmp_path):
    trainer, _ = set_up(config, tmp_path, None)
    expected = run_steps(trainer, 3)
    other, _ = set_up(config, tmp_path, None)
    torch.manual_seed(99)
    assert run_steps(other, 3) != expected


def test_command_line_resumes_to_the_same_file(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert (tmp_path / "run/model/config.json").is_file()
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == [
        "step-00000008",
        "step-00000010",
    ]
    other = [*arguments, "--output", str(tmp_path / "other"), "--no-export"]
    assert main([*other, "--steps", "6"]) == 0
    assert main([*other, "--resume"]) == 0
    assert "at step 6" in capsys.readouterr().out
    assert logged_losses(tmp_path / "other") == logged_losses(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
@pytest.mark.parametrize("start", [["training/train.py"], ["-m", "training.train"]], ids=str)
def test_signal_saves_and_the_rest_is_bit_identical(arguments, tmp_path, capsys, number, start):
    whole = [*arguments, "--output", str(tmp_path / "whole"), "--no-export"]
    assert main(whole) == 0
    stopped = [*arguments, "--steps", "1000000", "--checkpoint-interval", "1000000"]
    with subprocess.Popen(
        [sys.executable, *start, *stopped], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2:"):
                break
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 128 + number
    assert f"{number.name} at step" in rest
    assert "--resume" in rest

    (checkpoint,) = list_checkpoints(tmp_path / "run/checkpoints")
    done = len(load_checkpoint(checkpoint)["progress"]["log"])
    assert done >= 2
    steps = max(10, done + 1)
    assert main([*arguments, "--resume", "--no-export", "--steps", str(steps)]) == 0
    # The subprocess may have had time for more than the ten steps of the whole run.
    assert logged_losses(tmp_path / "run")[:10] == logged_losses(tmp_path / "whole")


def test_a_second_signal_acts_at_once():
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs start with it ignored
    with train.StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_refuses_other_settings_and_other_data(config, tmp_path):
    trainer, _ = set_up(config, tmp_path, None)
    run_steps(trainer, 1)
    train.save_checkpoint(tmp_path, trainer.step, trainer.state(), keep=1)

    changed = dataclasses.replace(config, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"learning_rate must be 0\.01, .* got 1\.0"):
        set_up(changed, tmp_path, "latest")

    text = Path(config.data).read_text(encoding="utf-8")
    try:
        Path(config.data).write_text(text.replace("dull", "good"), encoding="utf-8")
        with pytest.raises(ValueError, match="other tokens"):
            set_up(config, tmp_path, "latest")
    finally:
        Path(config.data).write_text(text, encoding="utf-8")


def test_a_run_does_not_write_over_another(arguments, capsys):
    assert main([*arguments, "--no-export"]) == 0
    assert main(arguments) == 2
    assert "pass --resume" in capsys.readouterr().err


def test_no_checkpoint_to_resume(arguments, capsys):
    assert main([*arguments, "--resume"]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
    assert main([*arguments, "--resume", "/no/such/folder"]) == 2
    assert "there is no checkpoint /no/such/folder" in capsys.readouterr().err


def test_damaged_checkpoint_ends_a_resume(arguments, tmp_path, capsys):
    assert main([*arguments, "--no-export"]) == 0
    newest = tmp_path / "run/checkpoints/step-00000010"
    (newest / "optimizer.pt").write_bytes(b"nothing")
    assert main([*arguments, "--resume", "--steps", "12"]) == 2
    message = capsys.readouterr().err
    assert f"{newest} is damaged: optimizer.pt" in message
    assert "step-00000008" in message


def test_failed_save_ends_the_run_and_keeps_the_checkpoint(arguments, tmp_path, capsys):
    assert main([*arguments, "--steps", "4", "--no-export"]) == 0
    with pytest.MonkeyPatch.context() as patch:

        def full_disk(*_):
            raise CheckpointError("cannot write")

        patch.setattr(train, "save_checkpoint", full_disk)
        assert main([*arguments, "--resume"]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--no-export"]) == 0


def test_not_a_number_stops_before_it_is_saved(arguments, tmp_path, capsys):
    assert main([*arguments, "--learning-rate", "1e30", "--warmup-steps", "0"]) == 1
    assert "the loss of step" in capsys.readouterr().err
    assert not list_checkpoints(tmp_path / "run/checkpoints")
