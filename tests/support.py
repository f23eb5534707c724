"""The one place for random problems, the truth in float64, and the error budget.

An implementation is judged by the error that PyTorch itself makes in the same dtype: the same
problem goes through ``F.cross_entropy(F.linear(e, c, bias).float(), targets)`` twice, in float64
(the truth) and in the dtype under test (plain). Ours may be off by at most ``budget_factor`` times
as much as plain is, plus ``FLOOR`` for where plain happens to be exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.lazy import notices
from cut_cross_entropy.options import KERNEL_IMPLS

IMPLS = ("chunked", "torch_compile", "reference")
"""The implementations that run on every machine."""

FLOOR = {torch.float32: 8.0, torch.float64: 32.0}
"""Units of rounding granted in addition to plain's error, which counts as 0 in float64."""

KERNEL_FLOOR = 84.0
"""The same for the kernels' gradients: 1e-5. Their backward computes the logits again, in units of
log2, so a probability is off by the rounding of the largest logit rather than by its own."""


def forget_warnings() -> None:
    """Give every warning about lazy logits again the next time its reason occurs."""
    notices._given.clear()


def is_computed(logits: Tensor) -> bool:
    """Return whether lazy logits were used."""
    return logits.lazy.storage.value is not None


def budget_factor(impl: str, dtype: torch.dtype) -> float:
    """Return how many times the error of plain PyTorch is allowed.

    With half precision inputs, implementations that compute in float32 are never worse than plain.
    Otherwise the sums have the same precision in another order, and 2 covers the luck of it.
    """
    return 1.0 if dtype.itemsize == 2 and impl != "torch_compile" else 2.0


@dataclass(frozen=True)
class Problem:
    """The tensors of one call."""

    e: Tensor  # (..., D)
    c: Tensor  # (V, D)
    targets: Tensor  # (...,)
    bias: Tensor | None = None  # (V,)

    def to(self, dtype: torch.dtype) -> "Problem":
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, e=self.e.to(dtype), c=self.c.to(dtype), bias=bias)

    def on(self, device: torch.device | str) -> "Problem":
        bias = None if self.bias is None else self.bias.to(device)
        e, c, targets = (x.to(device) for x in (self.e, self.c, self.targets))
        return Problem(e, c, targets, bias)


@dataclass(frozen=True)
class Results:
    """Results of one call and its gradients; None for a gradient that was not asked for."""

    loss: Tensor
    lse: Tensor
    grad_e: Tensor | None
    grad_c: Tensor | None
    grad_bias: Tensor | None

    def named(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


def make_problem(
    leading: Sequence[int] = (6, 5),
    classes: int = 300,  # three blocks of the bounded implementation, the last one partial
    dim: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    ignored: float = 0.25,
    ignore_index: int = -100,
    target_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> Problem:
    """Random tensors whose logits have a standard deviation of about 3: a peaked softmax."""
    random = torch.Generator().manual_seed(seed)
    e = torch.randn(*leading, dim, generator=random, dtype=torch.float64)
    c = torch.randn(classes, dim, generator=random, dtype=torch.float64) * 3 / dim**0.5
    b = torch.randn(classes, generator=random, dtype=torch.float64) if bias else None
    targets = torch.randint(0, classes, tuple(leading), generator=random)
    drop = torch.rand(tuple(leading), generator=random) < ignored
    targets = targets.masked_fill(drop, ignore_index).to(target_dtype)
    return Problem(e, c, targets, b).to(dtype)


def full_logits(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int | bool = 0,
) -> tuple[Tensor, Tensor]:
    """Loss and lse as plain PyTorch has them: product in the given dtype, the rest wider."""
    if shift:
        e, targets = e[..., : e.shape[-2] - int(shift), :], targets[..., int(shift) :]
    wide = torch.promote_types(e.dtype, torch.float32)
    if bias is None or bias.dtype == c.dtype:
        logits = F.linear(e, c, bias).to(wide)
    else:
        logits = F.linear(e, c).to(wide) + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits, flat = logits.reshape(-1, c.shape[0]), targets.reshape(-1).long()
    losses = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="none")
    kept = flat != ignore_index
    lse = torch.where(kept, logits.logsumexp(1), 0).reshape(targets.shape)
    if reduction == "none":
        return losses.reshape(targets.shape), lse
    return losses.sum() / (kept.sum().clamp_min(1) if reduction == "mean" else 1), lse


def run(
    compute: Callable[..., tuple[Tensor, Tensor]],
    problem: Problem,
    needed: Sequence[str] = ("e", "c", "bias"),
    lse_weight: float = 0.1,
    **options: object,
) -> Results:
    """Results of ``compute``, with gradients of a weighted sum of loss and lse per token."""
    e, c, bias = (
        None if x is None else x.detach().requires_grad_(name in needed)
        for name, x in (("e", problem.e), ("c", problem.c), ("bias", problem.bias))
    )
    loss, lse = compute(e, c, problem.targets, bias, **options)
    random = torch.Generator().manual_seed(1)
    upstream = torch.randn(loss.shape, generator=random, dtype=torch.float64).to(loss)
    objective = (loss * upstream).sum()
    if lse_weight:
        weights = torch.rand(lse.shape, generator=random, dtype=torch.float64).to(lse)
        objective = objective + lse_weight * (lse * weights).sum()
    if objective.requires_grad:
        objective.backward()
    grads = (None if x is None else x.grad for x in (e, c, bias))
    return Results(loss.detach(), lse.detach(), *grads)


def leaves_of(problem: Problem) -> list[Tensor]:
    """Embeddings, classifier and bias as leaves of a new graph."""
    return [x.detach().requires_grad_() for x in (problem.e, problem.c, problem.bias)]


def strided(problem: Problem, what: str) -> Problem:
    """The problem with one tensor, or "all", that is not contiguous."""
    tensors = {
        "e": problem.e.transpose(0, 1).contiguous().transpose(0, 1),
        "c": problem.c.T.contiguous().T,
        "targets": problem.targets.repeat_interleave(2, dim=-1)[..., ::2],
        "bias": problem.bias.repeat_interleave(3)[::3],
    }
    assert not any(tensor.is_contiguous() for tensor in tensors.values())
    return replace(problem, **(tensors if what == "all" else {what: tensors[what]}))


def run_ours(problem: Problem, impl: str, *, return_lse: bool = True, **options: object) -> Results:
    """Results of ``linear_cross_entropy``; zeros for an lse that is not asked for."""
    if return_lse:
        return run(linear_cross_entropy, problem, impl=impl, return_lse=True, **options)

    def loss_only(*inputs: object, **options: object) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(*inputs, **options), torch.zeros(())

    return run(loss_only, problem, impl=impl, **{**options, "lse_weight": 0.0})


def assert_within_budget(
    ours: Results,
    truth: Results,
    plain_errors: dict[str, float],
    dtype: torch.dtype,
    factor: float,
    gradient_floor: float | None = None,
) -> None:
    """Every element finite and within the budget; every shape and presence as in the truth."""
    assert ours.named().keys() == truth.named().keys()
    wide = torch.promote_types(dtype, torch.float32)
    for name, exact in truth.named().items():
        got = ours.named()[name]
        assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
        assert torch.isfinite(got).all(), f"{name} has elements that are not finite"
        # A result in half precision is rounded once more, by up to half a unit.
        rounding = torch.finfo(got.dtype).eps / 2 if got.dtype != wide else 0.0
        # A loss is a difference of an lse and a logit, and shares their rounding however small.
        scale = largest(exact) + (largest(truth.lse) if name == "loss" else 0.0)
        units = (name.startswith("grad") and gradient_floor) or FLOOR[wide]
        floor = (units * torch.finfo(wide).eps + rounding) * scale
        error, allowed = largest(got - exact), factor * plain_errors[name] + floor
        assert error <= allowed, (
            f"{name}: error {error:.3g} > {allowed:.3g}; plain PyTorch has {plain_errors[name]:.3g}"
        )


def largest(tensor: Tensor) -> float:
    """The largest absolute value, 0 of an empty tensor."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def check(problem: Problem, impl: str, **options: object) -> Results:
    """Compare one call with plain PyTorch, loss, lse and gradients; returns our results."""
    names = ("memory_budget", "return_lse", "recompute")
    of_ours = {key: options.pop(key) for key in names if key in options}
    ours = run_ours(problem, impl, **options, **of_ours)
    if of_ours.get("return_lse") is False:
        options["lse_weight"] = 0.0
    plain = run(full_logits, problem, **options)
    truth = run(full_logits, problem.to(torch.float64), **options)
    if of_ours.get("return_lse") is False:
        ours = replace(ours, lse=truth.lse)
    errors = {name: largest(plain.named()[name] - exact) for name, exact in truth.named().items()}
    if not truth.loss.ndim:
        # Errors of tokens cancel in a scalar by luck, so they are reduced instead of the losses.
        per_token = {**options, "reduction": "none", "needed": ()}
        low, high = (run(full_logits, p, **per_token) for p in (problem, problem.to(torch.float64)))
        difference, kept = (low.loss - high.loss).abs().sum(), (high.lse != 0).sum().clamp_min(1)
        errors["loss"] = (difference / (kept if options.get("reduction") != "sum" else 1)).item()
    dtype, factor = problem.e.dtype, budget_factor(impl, problem.e.dtype)
    floor = KERNEL_FLOOR if impl in KERNEL_IMPLS else None
    assert_within_budget(ours, truth, errors, dtype, factor, gradient_floor=floor)
    for name, tensor in (("e", problem.e), ("c", problem.c), ("bias", problem.bias)):
        grad = ours.named().get(f"grad_{name}")
        assert grad is None or grad.dtype == tensor.dtype, f"gradient of {name} in {grad.dtype}"
    return ours


def check_sure_token(impl: str, miss: float, rtol: float) -> None:
    """Loss and gradients of a token whose target has the probability ``1 - miss``."""
    classes = 200
    e = torch.zeros(1, classes)
    e[0, 7] = math.log((classes - 1) * (1 - miss) / miss)
    loss = linear_cross_entropy(
        e.requires_grad_(), torch.eye(classes), torch.tensor([7]), impl=impl
    )
    loss.backward()
    expected = torch.full((classes,), miss / (classes - 1))
    expected[7] = -miss
    torch.testing.assert_close(e.grad[0], expected, rtol=rtol, atol=0)
    torch.testing.assert_close(loss.item(), -math.log1p(-miss), rtol=rtol, atol=0)


def check_checkpoint(head: Callable[..., Tensor], *inputs: Tensor, use_reentrant: bool) -> None:
    """A loss that is computed again in the backward has the same gradients, to the bit."""
    expected_loss = head(*inputs)
    expected = torch.autograd.grad(expected_loss, inputs)
    loss = checkpoint(head, *inputs, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=2e-5, atol=0)  # two kernels on a GPU
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, expected, strict=True))


def names_of_launches(module, monkeypatch):
    """Record the names of the kernels that a module launches, in a list that is returned."""
    names, launch = [], module.launch

    def record(kernel, grid, **arguments):
        names.append(kernel.__name__)
        launch(kernel, grid, **arguments)

    monkeypatch.setattr(module, "launch", record)
    return names


def check_repeated_backward(impl, problem):
    """Check that a graph that is kept gives the same gradient again; return e and the loss."""
    e = problem.e.requires_grad_()
    loss = linear_cross_entropy(e, problem.c, problem.targets, impl=impl)
    loss.backward(retain_graph=True)
    once = e.grad.clone()
    loss.backward()
    assert torch.equal(e.grad, 2 * once)
    return e, loss
