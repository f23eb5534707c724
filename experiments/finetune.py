"""Fine-tune one model with full logits and without, several seeds each, and keep the curves.

    python -m experiments.finetune

Every method starts from the same weights and sees the same batches in the same order; the seed
decides the order. A judge that is the same for all (full logits in float32) measures the loss on
text that was held out.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.corpus import docstrings, installed_roots
from experiments.loop import REORDERED, Schedule, cut_windows, draw_batches, token_losses, train
from experiments.options import add_common_arguments, chosen_device, chosen_methods, file_name
from experiments.record import Clock, Record
from training.data import Windows
from training.models import SMOLLM2, load_model

SMOKE = {"steps": 3, "batch_size": 2, "length": 16, "held_out": 2, "megabytes": 0.3, "seeds": 1}
"""Settings of ``--smoke``: all of the code, in seconds on a CPU."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.finetune",
        description="Fine-tuning curves with full logits and without.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_common_arguments(parser, methods=["full", "cce", "cce_exact", REORDERED])
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="a folder, a .gguf file, or 'smollm2' if it is installed")
    add("--steps", type=int, default=200, help="steps of every run")
    add("--batch-size", type=int, default=8, help="sequences a step")
    add("--length", type=int, default=1024, help="tokens a sequence")
    add("--held-out", type=int, default=48, help="sequences held out")
    add("--learning-rate", type=float, default=1e-4, help="highest learning rate")
    add("--warmup-steps", type=int, default=20, help="steps of linear rise")
    add("--megabytes", type=float, default=12.0, help="text to read")
    add("--seeds", type=int, default=3, help="number of seeds")
    return parser


def tokenize(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """All ``texts`` in one row of token ids, an end of text between them."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.int64)


def run(arguments: argparse.Namespace) -> Path:
    """Do all runs; the file they are in.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: wrong settings, no such model, no text.
    """
    clock = Clock(arguments.time_limit)
    device = chosen_device(arguments.device)
    methods = chosen_methods(arguments, device)
    roots = arguments.roots or installed_roots()
    texts = docstrings(roots, int(arguments.megabytes * 1e6))
    model, tokenizer = load_model(arguments.model, torch.float32, device)
    windows = cut_windows(tokenize(texts, tokenizer), arguments.length)
    # One order for all seeds decides what is held out.
    shuffled = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    held_out, training = shuffled[: arguments.held_out], shuffled[arguments.held_out :]
    if not len(training):
        raise ValueError(f"megabytes must give more than {arguments.held_out} sequences of text")
    print(f"{windows.numel()} tokens, {len(training)} sequences to train on, on {device}")

    settings = {
        "model": Path(arguments.model).name,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "length": arguments.length,
        "learning_rate": arguments.learning_rate,
        "warmup_steps": arguments.warmup_steps,
        "precision": "float32 parameters, bfloat16 autocast" if arguments.autocast else "float32",
    }
    data = {
        "text": "help topics and docstrings of Python and of the installed packages",
        "tokens": windows.numel(),
        "held_out_tokens": held_out.numel(),
        "sha256": Windows(windows.flatten(), arguments.length, 0).fingerprint(),
    }
    path: Path = arguments.out / file_name("finetune", arguments.device_label, device)
    record = Record(path, "finetune", settings, data, device, arguments.commit)
    schedule = Schedule(arguments.learning_rate, arguments.warmup_steps, weight_decay=0.01)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def judge(step: int) -> dict[str, Any]:
        losses, _ = token_losses(
            model, held_out.to(device), arguments.batch_size, arguments.autocast
        )
        return {"held_out_loss": round(float(losses.double().mean()), 6)}

    record.content["before"] = judge(0)
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        batches = draw_batches(training, arguments.steps, arguments.batch_size, seed).to(device)
        for method in methods:
            name = {"method": method, "seed": seed}
            if not clock.fits():
                record.skip(name, f"time limit of {arguments.time_limit:g} s")
                continue
            started = time.monotonic()
            model.load_state_dict(start)
            torch.manual_seed(seed)
            result = train(
                model, method, batches, schedule, arguments.autocast, judge, arguments.steps
            )
            clock.note(time.monotonic() - started)
            record.add_run({**name, **result})
            print(
                f"{method}, seed {seed}: held out {result['judged'][-1]['held_out_loss']:.4f}, "
                f"{result['ms_per_step']:.1f} ms a step",
                flush=True,
            )
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 0 done, 2 wrong input."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        parser.set_defaults(**SMOKE)
        arguments = parser.parse_args(argv)
    try:
        print(f"written to {run(arguments)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"finetune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
