"""Two processes train as one does, resume exactly, and stop together; ZeRO-3 works with it."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessException

from cut_cross_entropy.benchmark.leave import leave
from tests.distributed.processes import fork_processes
from tests.training.conftest import copy_model
from training.checkpoint import list_checkpoints, verify_checkpoint
from training.train import build_parser, main, run_all

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def launch(processes, script, arguments):
    """Start a script in so many processes; stderr comes with stdout."""
    return subprocess.Popen(
        [sys.executable, *TORCHRUN, str(processes), str(script), *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def python(*arguments, environment=ENVIRONMENT):
    """Run Python in the root of the checkout; return what it printed, apart."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def run_two(folder, *command_lines):
    """Train by each of the command lines in two processes; return what was printed."""
    printed = folder / "printed"
    try:
        fork_processes(_run_all, (str(printed), free_port(), command_lines), 2)
    except ProcessException as error:
        pytest.fail(f"{error}\n{printed.read_text()}")
    return printed.read_text()


def _run_all(rank, printed, port, command_lines):
    """Processes start faster without torchrun, whose environment this is."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    of_group = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    of_group |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({**ENVIRONMENT, **{name: str(value) for name, value in of_group.items()}})
    torch.set_num_threads(1)
    for arguments in command_lines:
        code = run_all(build_parser().parse_args(arguments))
        if code:
            break
    leave(code)


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def log(output: Path, *names):
    with (output / "losses.csv").open(encoding="utf-8") as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


@pytest.fixture
def still(model_folder, tmp_path):
    """The arguments that take the dropout out: processes draw their own numbers."""
    return ["--model", str(copy_model(model_folder, tmp_path, attention_dropout=0.0))]


def test_two_processes_are_one_with_twice_the_batch(arguments, still, tmp_path):
    # 62 sequences less 2 that are held out: no batch of the first five steps is short.
    common = [*arguments, *still, "--eval-fraction", "0.04", "--steps", "5", "--log-interval", "1"]
    objectives = {
        "cross_entropy": [],
        "dpo": ["--data", "builtin"],
        "distillation": ["--teacher", still[1], "--from-scratch"],
    }

    def command_line(objective, name):
        own = ["--objective", objective, *objectives[objective], "--no-export"]
        return [*common, *own, "--output", str(tmp_path / name / objective)]

    two = (command_line(objective, "two") for objective in objectives)
    output = run_two(tmp_path, *([*words, "--batch-size", "4"] for words in two))
    assert output.count("step 5: loss") == 3  # one process writes
    for objective in objectives:
        assert main(command_line(objective, "one")) == 0
        folders = [tmp_path / name / objective for name in ("one", "two")]
        one, two = (log(folder, "loss", "eval_loss") for folder in folders)
        assert len(one) == len(two) == 5
        for a, b in zip(one, two, strict=True):
            assert float(b[0]) == pytest.approx(float(a[0]), abs=1e-5), objective
        assert float(two[-1][1]) == pytest.approx(float(one[-1][1]), abs=1e-4), objective
        a, b = (load_file(x / "checkpoints/checkpoint-5/model.safetensors") for x in folders)
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_signal_stops_both_after_the_same_step_and_the_rest_is_bit_identical(arguments, tmp_path):
    common = [*arguments, "--no-export", "--batch-size", "4"]
    endless = [*common, "--steps", "100000", "--checkpoint-interval", "100000"]
    with launch(2, "training/train.py", endless) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2:"):
                break
        process.send_signal(signal.SIGTERM)  # torchrun hands it on
        process.communicate(timeout=100)
    (saved,) = list_checkpoints(tmp_path / "run/checkpoints")
    verify_checkpoint(saved)
    done = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    steps = str(done + 3)
    whole = [*common, "--steps", steps, "--output", str(tmp_path / "whole")]
    run_two(tmp_path, [*common, "--resume", "--steps", steps], whole)
    parts, whole = (log(tmp_path / name, "loss", "grad_norm") for name in ("run", "whole"))
    assert len(whole) == done + 3
    assert parts == whole


@pytest.mark.parametrize("processes", [None, "2"])
def test_one_of_several_processes_leaves_without_the_end_of_the_interpreter(processes):
    """The threads that communicate may abort a process there."""
    program = "import atexit, os; from cut_cross_entropy.benchmark.leave import leave; "
    program += "print('all said'); atexit.register(os.abort); leave(3)"
    unset = ("WORLD_SIZE", "PYTHONUNBUFFERED")  # so that somebody has to write what is said
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in unset}
    if processes is not None:
        environment["WORLD_SIZE"] = processes
    done = python("-c", program, environment=environment)
    assert done.returncode == (-signal.SIGABRT if processes is None else 3), done.stderr
    assert done.stdout == ("" if processes is None else "all said\n")


def test_fsdp2_is_one_process_and_resumes(arguments, still, tmp_path):
    common = [*arguments, *still, "--eval-fraction", "0.04"]
    two = [*common, "--fsdp", "--batch-size", "4", "--output", str(tmp_path / "two")]
    run_two(tmp_path, [*two, "--steps", "4"], [*two, "--steps", "6", "--resume"])
    assert main([*common, "--steps", "6", "--output", str(tmp_path / "one")]) == 0
    one, two = (log(tmp_path / name, "loss", "eval_loss") for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert float(b[0]) == pytest.approx(float(a[0]), abs=1e-5)
    assert float(two[-1][1]) == pytest.approx(float(one[-1][1]), abs=1e-4)
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    head = b.pop("lm_head.weight")  # tied, and gathered by itself
    assert torch.equal(head, b["model.embed_tokens.weight"])
    assert set(a) == set(b)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_fsdp2_spreads_the_weights(arguments, tmp_path):
    """Each process has half of them, and the whole in bfloat16 while a layer computes."""
    start = tmp_path / "start.py"
    start.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from training import trainer\n"
        "def say(*what):\n"
        "    os.write(1, (' '.join(map(str, what)) + os.linesep).encode())  # in one piece\n"
        "def looks(self, model, *rest, before=trainer.Trainer.compute_loss, **options):\n"
        "    own = self.model.model.layers[0].mlp.gate_proj\n"
        "    say('own', *own.weight.to_local().shape, own.weight.dtype)\n"
        "    show = lambda own, _: say('inside', *own.weight.shape, own.weight.dtype)\n"
        "    own.register_forward_pre_hook(show)\n"
        "    loss = before(self, model, *rest, **options)\n"
        "    say('loss', loss.dtype)\n"
        "    return loss\n"
        "trainer.Trainer.compute_loss = looks\n"
        "from cut_cross_entropy.benchmark.leave import leave\n"
        "from training.train import main\n"
        "leave(main(sys.argv[1:]))\n"
    )
    options = [*arguments, "--fsdp", "--steps", "1", "--no-export", "--dtype", "autocast"]
    done = python(*TORCHRUN, "2", str(start), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("own 32 32 torch.float32", "inside 64 32 torch.bfloat16", "loss torch.float32"):
        assert done.stdout.count(line) == 2, done.stdout


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "--fsdp needs processes: start with torchrun"),
        (["--deepspeed", "training/zero3.json"], "--fsdp and --deepspeed exclude each other"),
    ],
)
def test_fsdp2_that_cannot_be_is_refused(extra, message, arguments, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main([*arguments, "--fsdp", *extra]) == 2
    assert message in capsys.readouterr().err


def test_zero3_configuration():
    """The file has what the Trainer fills in, and a stage that spreads the weights."""
    settings = json.loads((ROOT / "training/zero3.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert settings["torch_autocast"] == {"enabled": "auto", "dtype": "bfloat16"}
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"):
        assert settings[name] == "auto"


def test_zero3_trains_resumes_and_needs_no_logits(arguments, still, tmp_path):
    """One process: accelerate starts no more of them with DeepSpeed on CPUs."""
    pytest.importorskip("deepspeed")
    # A kernel that one process does without; DeepSpeed would compile it first.
    start = (
        "import deepspeed, runpy, sys; deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = "
        "False; sys.argv = sys.argv[1:]; runpy.run_path('training/train.py', run_name='__main__')"
    )
    environment = {
        **ENVIRONMENT,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "LOCAL_WORLD_SIZE": "1",
    }
    common = [*arguments, *still, "--eval-fraction", "0.04", "--dtype", "autocast"]
    zero3 = ["training/train.py", *common, "--deepspeed", "training/zero3.json"]
    for extra in (["--steps", "4"], ["--steps", "6", "--resume"]):
        done = python("-c", start, *zero3, *extra, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    # --loss chunked: a loss that took the model's own logits would have ended the run.
    assert main([*common, "--steps", "6", "--output", str(tmp_path / "plain")]) == 0
    ours, plain = (log(tmp_path / name, "loss", "eval_loss") for name in ("run", "plain"))
    assert len(ours) == len(plain) == 6
    for a, b in zip(ours, plain, strict=True):
        assert float(a[0]) == pytest.approx(float(b[0]), abs=2e-3)
    exported = load_file(tmp_path / "run/model/model.safetensors")
    assert exported["model.embed_tokens.weight"].shape == (256, 32)
