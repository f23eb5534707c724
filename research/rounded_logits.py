"""``python -m research.rounded_logits FILE``: what logits in bfloat16 do to probability ratios.

FILE is what ``python -m research.hidden`` writes: bfloat16 hidden states e (N, D) before the head c
(V, D) of a real model, and the next tokens t (N,). Policy and old policy are the same model here,
so that every ratio should be 1. One log-probability is computed as stated, the other in float64.
"""

import argparse

import torch
from torch import Tensor

from cut_cross_entropy import token_logprobs


def plain(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
    """Log-probabilities (N,) of logits in the dtype of ``e``; the softmax is float32 or wider."""
    wide = torch.promote_types(e.dtype, torch.float32)
    parts = zip(e.split(256), t.split(256), strict=True)
    return torch.cat(
        [(x @ c.T).to(wide).log_softmax(1).gather(1, y[:, None])[:, 0].double() for x, y in parts]
    )


def compare(e: Tensor, c: Tensor, t: Tensor, length: int = 256) -> dict[str, dict[str, float]]:
    """Errors of log-probabilities and of ratios, by way of computing; sequences of ``length``."""
    exact = plain(e.double(), c.double(), t)
    ways = {
        "logits rounded to bfloat16": plain(e, c, t),
        "logits in float32": plain(e.float(), c.float(), t),
        "`token_logprobs`": token_logprobs(e, c, t).logprobs.double(),
    }
    table = {}
    for name, found in ways.items():
        error = found - exact
        ratio = error.exp()
        table[name] = {
            "mean error of a log-probability, nats": float(error.abs().mean()),
            "largest": float(error.abs().max()),
            "ratios outside [0.99, 1.01]": float(((ratio - 1).abs() > 0.01).double().mean()),
            "outside [0.98, 1.02]": float(((ratio - 1).abs() > 0.02).double().mean()),
            f"largest |log ratio| of {length} tokens": float(
                error[: len(error) // length * length].view(-1, length).sum(1).abs().max()
            ),
        }
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    data = torch.load(parser.parse_args().file)
    for name, row in compare(data["e"], data["c"], data["t"].long()).items():
        print(name, *(f"{key}: {value:.2g}" for key, value in row.items()), sep=" | ")


if __name__ == "__main__":
    main()
