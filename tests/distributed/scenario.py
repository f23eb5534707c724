"""Training with a sharded vocabulary: half precision, z-loss, ignored tokens, in every process.

The single-process values come from full logits in float64, and the errors granted from full logits
in the dtype itself.
"""

import functools

import torch

from cut_cross_entropy import VocabParallelOptions, linear_cross_entropy
from cut_cross_entropy.utils import compute_z_loss
from tests.distributed.sharded import assert_same_bits
from tests.support import full_logits

Z_WEIGHT = 0.1


def step(compute, e, c, targets):
    """Loss with z-loss, and the gradients of e and c."""
    e, c = (x.detach().clone().requires_grad_() for x in (e, c))
    loss, lse = compute(e, c, targets)
    loss = loss + Z_WEIGHT * compute_z_loss(lse, targets, shift=True)
    loss.backward()
    return loss.detach(), e.grad, c.grad


def train(rank, impl, dtype, device="cpu", tokens=(4, 13), classes=507, dim=64):
    """Compare one step of all processes, each with its rows, to one process with all."""
    random = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype)
    e = torch.randn(*tokens, dim, generator=random).to(device, dtype)
    c = (torch.randn(classes, dim, generator=random) * 2 / dim**0.5).to(device, dtype)
    targets = torch.randint(0, classes, tokens, generator=random)
    targets[torch.rand(tokens, generator=random) < 0.2] = -100
    targets = targets.to(device)

    def full(e, c, targets):
        loss, lse = full_logits(e, c, targets, shift=1)
        padded = torch.zeros(targets.shape, dtype=lse.dtype, device=device)
        padded[..., :-1] = lse
        return loss, padded[..., :-1]

    truth = step(full, e.double(), c.double(), targets)
    plain = step(full, e, c, targets)
    own = VocabParallelOptions.from_vocab(classes)
    here = slice(own.start, own.stop)
    ours = step(
        functools.partial(
            linear_cross_entropy,
            shift=1,
            return_lse=True,
            impl=impl,
            vocab_parallel_options=own,
        ),
        e,
        c[here],
        targets,
    )
    assert_same_bits(ours[0], "loss")
    assert_same_bits(ours[1], "grad_e")
    error = (ours[0] - truth[0]).abs()
    allowed = 2 * (plain[0] - truth[0]).abs() + 1e-3 * truth[0].abs()
    assert error <= allowed, f"loss: error {error:.3g} > {allowed:.3g}"
    named = {"grad_e": (ours[1], plain[1], truth[1])}
    named["grad_c"] = (ours[2], plain[2][here], truth[2][here])
    for name, (got, low, exact) in named.items():
        assert got.dtype == dtype
        error, budget = ((x - exact).norm() / exact.norm() for x in (got, low))
        # Each part of dE is rounded on its process, and the sum of them once more.
        allowed = 1.5 * budget + torch.finfo(dtype).eps
        assert error <= allowed, f"{name}: relative error {error:.3g} > {allowed:.3g}"
