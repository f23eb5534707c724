"""Pretrain a small model with a large vocabulary from scratch, with full logits and without.

    python -m experiments.pretrain

A tokenizer is trained on the text of the installed Python packages; its many tokens are mostly
rare. The loss is measured on folders that training never saw, apart for tokens by how often
training saw them, and the probability that is left on tokens that it never saw: where a filter
drops small gradients, those are not pushed down.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments import comparison
from experiments.comparison import Experiment, cut_windows, mean, sha256, token_losses, tokenize
from experiments.corpus import sources
from training.arguments import Parser

SMOKE = {
    "steps": 4, "batch_size": 2, "sequence_length": 16, "held_out": 4, "megabytes": 0.5, "seeds": 1,
    "vocabulary": 600, "layers": 1, "width": 32, "judge_interval": 2,
}  # fmt: skip
"""Settings of ``--smoke``: all of the code, in seconds on a CPU."""

BUCKETS = (1, 10, 100, 1000)
"""First counts of the groups of tokens, by how often training saw them; the first is never."""

END = "<|end|>"


def build_parser() -> Parser:
    """Build the command line."""
    parser = comparison.build_parser(
        "pretrain",
        "Pretraining curves and rare tokens with full logits and without.",
        steps=1000,
        batch_size=16,
        sequence_length=512,
        held_out=256,
        learning_rate=1e-3,
        warmup_steps=100,
        megabytes=80.0,
        seeds=2,
        judge_interval=250,
    )
    add = parser.add_argument
    add("--vocabulary", type=int, default=131072, help="tokens of the tokenizer that is trained")
    add("--layers", type=int, default=4, help="layers of the model")
    add("--width", type=int, default=512, help="features of the model")
    return parser


def train_tokenizer(texts: Sequence[str], size: int) -> Any:
    """Train a byte-level BPE tokenizer of at most ``size`` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


class Pretrain(Experiment):
    """A Llama with random weights and a head of its own, on sources and documents."""

    weight_decay = 0.1

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        super().__init__(arguments, device)
        texts, held_out = sources(self.roots, self.characters)
        tokenizer = train_tokenizer(texts, arguments.vocabulary)
        self.vocabulary = len(tokenizer)
        tokens = tokenize(texts, tokenizer)
        self.training = cut_windows(tokens, arguments.sequence_length)
        windows = cut_windows(tokenize(held_out, tokenizer), arguments.sequence_length)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        self.held_out = windows[order[: arguments.held_out]].to(device)
        self.settings = {
            "layers": arguments.layers, "width": arguments.width, "vocabulary": self.vocabulary,
        }  # fmt: skip
        self.data = {
            "text": "sources and documents of Python and of the installed packages",
            "files": len(texts),
            "held_out_files": len(held_out),
            "tokens": tokens.numel(),
            "sha256": sha256(self.training),
        }

    def make_model(self, seed: int) -> Any:
        """Return a model with the random weights of ``seed``."""
        from transformers import LlamaConfig, LlamaForCausalLM

        width = self.arguments.width
        heads = max(1, width // 64)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=self.arguments.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=self.arguments.sequence_length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        model: Any = LlamaForCausalLM(config)
        return model.to(self.device)

    def count(self, batches: Tensor) -> Tensor:
        """Count how often ``batches`` show each token as a target, (V,)."""
        return torch.bincount(batches[:, :, 1:].flatten(), minlength=self.vocabulary)

    def describe(self, batches: Tensor) -> dict[str, Any]:
        """Count the tokens that training never shows."""
        return {"unseen_tokens": int((self.count(batches) == 0).sum())}

    def measure(self, model: Any, batches: Tensor) -> dict[str, Any]:
        """Measure also the loss by rarity and the probability of tokens that training never saw."""
        counts = self.count(batches)
        losses, mass = token_losses(model, self.held_out, counts == 0)
        seen = counts[self.held_out[:, 1:]].flatten().cpu()
        rarity = by_rarity(losses.flatten(), seen)
        return {"held_out_loss": mean(losses), "unseen_mass": mass, **rarity}


def by_rarity(
    losses: Tensor,  # (n,), float32
    seen: Tensor,  # (n,), int64
) -> dict[str, Any]:
    """Average the losses of targets, grouped by how often training saw each.

    Args:
        losses: of each target.
        seen: how often training saw that target's token.

    Returns:
        ``"buckets"``, a list of groups with their bounds (the upper one excluded, None for the
        last), sizes and losses; ``"rarest_tenth"``, the targets at or below the count that a tenth
        of them does not exceed.
    """

    def group(inside: Tensor) -> dict[str, Any]:
        count = int(inside.sum())
        return {"targets": count, "loss": mean(losses[inside]) if count else None}

    buckets = []
    for low, high in zip((0, *BUCKETS), (*BUCKETS, None), strict=True):
        inside = seen >= low if high is None else (seen >= low) & (seen < high)
        buckets.append({"from": low, "below": high, **group(inside)})
    most = int(seen.sort().values[max(0, len(seen) // 10 - 1)])
    return {"buckets": buckets, "rarest_tenth": {"at_most": most, **group(seen <= most)}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 done, 2 wrong input."""
    return comparison.main(build_parser(), SMOKE, Pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
