"""Measure what ``cce_patch`` adds to a step, the operator that it calls excepted.

    python -m research.patch_overhead

The same forward pass runs through the patch and, in turns, with the least that could do the same:
the head hands its features on, and ``F.cross_entropy`` is a function that calls the operator with
them. All of the model's own code runs in both. The model is tiny, so that the difference is not
lost in the noise of the arithmetic; it does not depend on the size of the model. Times are what
the thread had of the processor, so other work on the machine hardly adds to them.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.options import Reduction
from cut_cross_entropy.transformers import cce_patch


def tiny_llama() -> transformers.LlamaForCausalLM:
    """One layer, as many features as classes, so that features pass for logits."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def alternate(
    first: Callable[[], object], second: Callable[[], object], calls: int
) -> tuple[list[float], list[float]]:
    """Sorted microseconds of each call of both, which take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in range(calls):
        pair = ((0, first), (1, second))
        for index, function in pair if call % 2 else pair[::-1]:
            start = time.thread_time_ns()
            function()
            times[index].append((time.thread_time_ns() - start) / 1e3)
    return sorted(times[0]), sorted(times[1])


def main() -> None:
    """Print the median and the tenth percentile of each, and their differences."""
    parser = argparse.ArgumentParser(prog="python -m research.patch_overhead", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 8))
    plain, patched, by_hand = tiny_llama(), cce_patch(tiny_llama()), tiny_llama()

    weight = by_hand.lm_head.weight
    by_hand.lm_head.forward = lambda features: features
    original = F.cross_entropy

    def cross_entropy(
        features: Tensor, targets: Tensor, ignore_index: int, reduction: Reduction
    ) -> Tensor:
        return linear_cross_entropy(
            features, weight, targets, ignore_index=ignore_index, reduction=reduction
        )

    def hand() -> object:
        F.cross_entropy = cross_entropy  # type: ignore[assignment]
        try:
            return by_hand(input_ids=ids, labels=ids)
        finally:
            F.cross_entropy = original

    for training in (True, False):
        patched.train(training)
        by_hand.train(training)
        plain.train(training)
        through, written = alternate(lambda: patched(input_ids=ids, labels=ids), hand, args.calls)
        full, _ = alternate(lambda: plain(input_ids=ids, labels=ids), hand, args.calls // 4)
        for name, share in (("median", 0.5), ("tenth percentile", 0.1)):
            a, b, c = (times[int(len(times) * share)] for times in (through, written, full))
            print(
                f"{'training' if training else 'evaluation':10} {name:16}  through the patch "
                f"{a:7.1f} us  by hand {b:7.1f} us  difference {a - b:6.1f} us  "
                f"(unpatched, full logits: {c:7.1f} us)"
            )


if __name__ == "__main__":
    main()
