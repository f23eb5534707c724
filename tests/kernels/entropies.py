"""Entropies of large logits that no product rounds, so that only the kernel's sums can err."""

import torch
from torch import Tensor

from cut_cross_entropy import token_logprobs

LARGEST = 30.0
LIMIT = 2e-6  # the textbook difference of log-sum-exp and mean logit errs by 1e-5 here


def problem_of_large_logits(device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return e (256, 16), c (1100, 16) and targets, exact in float16, as are their logits.

    The highest logit of every token is between 28 and LARGEST; entropies are 0.003 to 2.2 nats.
    """
    random = torch.Generator().manual_seed(0)
    e = torch.randint(-16, 17, (256, 16), generator=random) / 8
    c = torch.randint(-16, 17, (1100, 16), generator=random) / 8
    e *= (LARGEST * 16 / (e @ c.T).amax(1, keepdim=True)).floor() / 16
    targets = torch.randint(0, 1100, (256,), generator=random)
    return e.half().to(device), c.half().to(device), targets.to(device)


def check_entropies(device: str | torch.device, dtype: torch.dtype) -> None:
    e, c, targets = problem_of_large_logits(device)
    logits = e.double() @ c.double().T
    assert 28 < logits.amax(1).min() <= logits.max() <= LARGEST
    log_p = logits.log_softmax(1)
    exact = -(log_p.exp() * log_p).sum(1)
    got = token_logprobs(e.to(dtype), c.to(dtype), targets, outputs=("entropy",), impl="cce")
    assert got.entropy is not None
    error = (got.entropy.double() - exact).abs().max().item()
    assert error <= LIMIT, f"{error:.2e}"
