"""Pretrain a small model with a large vocabulary from scratch, with full logits and without.

    python -m experiments.pretrain

A tokenizer is trained on the text of the installed Python packages; its many tokens are mostly
rare. Every method starts from the same weights and sees the same batches. The judge (full logits
in float32) measures the loss on folders that training never saw, apart for tokens by how often
training saw them, and the probability that is left on tokens that it never saw: where a filter
drops small gradients, those are not pushed down.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.corpus import installed_roots, sources
from experiments.loop import REORDERED, Schedule, cut_windows, draw_batches, token_losses, train
from experiments.options import add_common_arguments, chosen_device, chosen_methods, file_name
from experiments.record import Clock, Record

SMOKE = {
    "steps": 4,
    "batch_size": 2,
    "length": 16,
    "held_out": 4,
    "megabytes": 0.5,
    "vocabulary": 600,
    "layers": 1,
    "width": 32,
    "seeds": 1,
    "judge_interval": 2,
}
"""Settings of ``--smoke``: all of the code, in seconds on a CPU."""

BUCKETS = (1, 10, 100, 1000)
"""Where the groups of tokens begin, by how often training saw them; the first is never."""

END = "<|end|>"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pretrain",
        description="Pretraining curves and rare tokens with full logits and without.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_common_arguments(parser, methods=["full", "cce", "cce_exact", REORDERED])
    add = parser.add_argument
    add("--vocabulary", type=int, default=131072, help="tokens of the tokenizer that is trained")
    add("--layers", type=int, default=4, help="layers of the model")
    add("--width", type=int, default=512, help="features of the model")
    add("--steps", type=int, default=1000, help="steps of every run")
    add("--batch-size", type=int, default=16, help="sequences a step")
    add("--length", type=int, default=512, help="tokens a sequence")
    add("--held-out", type=int, default=256, help="sequences of held-out text")
    add("--learning-rate", type=float, default=1e-3, help="highest learning rate")
    add("--warmup-steps", type=int, default=100, help="steps of linear rise")
    add("--judge-interval", type=int, default=250, help="steps from one look at held-out text")
    add("--megabytes", type=float, default=80.0, help="text to read")
    add("--seeds", type=int, default=2, help="number of seeds")
    return parser


def train_tokenizer(texts: Sequence[str], size: int) -> Any:
    """A byte-level BPE tokenizer of at most ``size`` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def tokenize(texts: list[str], tokenizer: Any) -> Tensor:
    """All ``texts`` in one row of token ids, an end of text after each."""
    end = tokenizer.token_to_id(END)
    rows = [
        torch.tensor([*encoding.ids, end], dtype=torch.int64)
        for start in range(0, len(texts), 2048)
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 2048])
    ]
    return torch.cat(rows)


def make_model(vocabulary: int, arguments: argparse.Namespace, seed: int) -> Any:
    """A Llama with random weights and a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, arguments.width // 64)
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=arguments.width,
            intermediate_size=arguments.width * 8 // 3 // 32 * 32,
            num_hidden_layers=arguments.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=arguments.length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def by_rarity(
    losses: Tensor,  # (n,), float32
    seen: Tensor,  # (n,), int64
) -> dict[str, Any]:
    """Mean loss of targets, grouped by how often training saw each.

    Args:
        losses: of each target.
        seen: how often training saw that target's token.

    Returns:
        ``"buckets"``, a list of groups with their bounds (the upper one excluded, None for the
        last), sizes and losses; ``"rarest_tenth"``, the targets at or below the count that a tenth
        of them does not exceed.
    """
    buckets = []
    for low, high in zip((0, *BUCKETS), (*BUCKETS, None), strict=True):
        inside = seen >= low if high is None else (seen >= low) & (seen < high)
        buckets.append({"from": low, "below": high, **_mean(losses[inside])})
    most = int(seen.sort().values[max(0, len(seen) // 10 - 1)])
    return {"buckets": buckets, "rarest_tenth": {"at_most": most, **_mean(losses[seen <= most])}}


def _mean(losses: Tensor) -> dict[str, Any]:
    count = losses.numel()
    return {"targets": count, "loss": round(float(losses.double().mean()), 6) if count else None}


def run(arguments: argparse.Namespace) -> Path:
    """Do all runs; the file they are in.

    Raises:
        ValueError, RuntimeError: wrong settings, no text.
    """
    clock = Clock(arguments.time_limit)
    device = chosen_device(arguments.device)
    methods = chosen_methods(arguments, device)
    started = time.monotonic()
    text = sources(arguments.roots or installed_roots(), int(arguments.megabytes * 1e6))
    print(f"read in {time.monotonic() - started:.0f} s", flush=True)
    tokenizer = train_tokenizer(text.train, arguments.vocabulary)
    vocabulary = tokenizer.get_vocab_size()
    print(f"{vocabulary} tokens after {time.monotonic() - started:.0f} s", flush=True)
    tokens = tokenize(text.train, tokenizer)
    training = cut_windows(tokens, arguments.length)
    held_out = cut_windows(tokenize(text.held_out, tokenizer), arguments.length)
    if not len(training) or not len(held_out):
        raise ValueError(f"megabytes must give text for windows of {arguments.length} tokens")
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    held_out = held_out[order[: arguments.held_out]].to(device)
    print(
        f"{tokens.numel()} tokens to train on, {held_out.numel()} held out, on {device}, "
        f"after {time.monotonic() - started:.0f} s",
        flush=True,
    )

    names = ("steps", "batch_size", "length", "layers", "width", "learning_rate", "warmup_steps")
    settings = {
        **{name: getattr(arguments, name) for name in names},
        "vocabulary": vocabulary,
        "precision": "float32 parameters, bfloat16 autocast" if arguments.autocast else "float32",
    }
    data = {
        "text": "sources and documents of Python and of the installed packages",
        "files": len(text.train),
        "held_out_files": len(text.held_out),
        "tokens": tokens.numel(),
        "held_out_tokens": held_out.numel(),
        "sha256": hashlib.sha256(training.numpy().tobytes()).hexdigest(),
    }
    path: Path = arguments.out / file_name("pretrain", arguments.device_label, device)
    record = Record(path, "pretrain", settings, data, device, arguments.commit)
    schedule = Schedule(arguments.learning_rate, arguments.warmup_steps, weight_decay=0.1)

    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        batches = draw_batches(training, arguments.steps, arguments.batch_size, seed)
        counts = torch.bincount(batches[:, :, 1:].flatten(), minlength=vocabulary)
        batches = batches.to(device)
        for method in methods:
            name = {"method": method, "seed": seed}
            if not clock.fits():
                record.skip(name, f"time limit of {arguments.time_limit:g} s")
                continue
            began = time.monotonic()
            result = _one_run(arguments, method, seed, batches, counts, held_out, schedule)
            clock.note(time.monotonic() - began)
            record.add_run({**name, **result})
            last = result["judged"][-1]
            print(
                f"{method}, seed {seed}: held out {last['held_out_loss']:.4f}, rarest tenth "
                f"{last['rarest_tenth']['loss']:.4f}, never seen {last['unseen_mass']:.2e}, "
                f"{result['ms_per_step']:.1f} ms a step",
                flush=True,
            )
    return path


def _one_run(
    arguments: argparse.Namespace,
    method: str,
    seed: int,
    batches: Tensor,  # (S, B, T)
    counts: Tensor,  # (V,): how often training sees each token
    held_out: Tensor,  # (n, T)
    schedule: Schedule,
) -> dict[str, Any]:
    device = batches.device
    model = make_model(len(counts), arguments, seed).to(device)
    unseen = (counts == 0).to(device)
    seen = counts[held_out[:, 1:].cpu()].flatten()

    def judge(step: int) -> dict[str, Any]:
        losses, mass = token_losses(
            model, held_out, arguments.batch_size, arguments.autocast, unseen
        )
        return {
            "held_out_loss": round(float(losses.double().mean()), 6),
            "unseen_mass": mass,
            **by_rarity(losses.flatten(), seen),
        }

    result = train(
        model,
        method,
        batches,
        schedule,
        arguments.autocast,
        judge,
        arguments.judge_interval,
    )
    return {**result, "unseen_tokens": int(unseen.sum())}


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
        print(f"pretrain: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
