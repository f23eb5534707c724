"""A vocabulary-parallel call held against one process with all classes, in float64."""

from dataclasses import replace

import torch
import torch.distributed as dist

from cut_cross_entropy import VocabParallelOptions
from cut_cross_entropy.options import KERNEL_IMPLS
from tests.support import (
    KERNEL_FLOOR,
    Problem,
    Results,
    assert_within_budget,
    budget_factor,
    full_logits,
    largest,
    run,
    run_ours,
)


def rows(problem, options):
    """The problem as one process has it: its classes' rows."""
    here = slice(options.start, options.stop)
    bias = None if problem.bias is None else problem.bias[here]
    return Problem(problem.e, problem.c[here].clone(), problem.targets, bias)


def rows_of(results, options):
    """The part of one process's results that a process of the group has."""
    here = slice(options.start, options.stop)
    parts = (None if x is None else x[here] for x in (results.grad_c, results.grad_bias))
    return Results(results.loss, results.lse, results.grad_e, *parts)


def truth_and_errors(problem, **options):
    """Results in float64, and by how much plain PyTorch misses them in the problem's dtype."""
    truth = run(full_logits, problem.to(torch.float64), **options)
    plain = run(full_logits, problem, **options)
    errors = {name: largest(plain.named()[name] - x) for name, x in truth.named().items()}
    if not truth.loss.ndim:  # errors of tokens cancel in a scalar by luck
        errors["loss"] = max(errors["loss"], errors["lse"])
    return truth, errors


def check(problem, impl, vocab_parallel=None, kernel_floor=KERNEL_FLOOR, **options):
    """Every process's part within the error budget; what all have, the same bits everywhere."""
    dtype = problem.e.dtype
    vocab_parallel = vocab_parallel or VocabParallelOptions.from_vocab(problem.c.shape[0])
    names = ("memory_budget", "filter_eps", "return_lse", "recompute")
    own = {key: options.pop(key) for key in names if key in options}
    if own.get("return_lse") is False:
        options["lse_weight"] = 0.0
    truth, errors = truth_and_errors(problem, **options)
    part = rows(problem, vocab_parallel)
    ours = run_ours(part, impl, vocab_parallel_options=vocab_parallel, **own, **options)
    for name, tensor in (("loss", ours.loss), ("lse", ours.lse), ("grad_e", ours.grad_e)):
        if tensor is None or (name == "grad_e" and not vocab_parallel.reduce_e_grad):
            continue
        assert_same_bits(tensor, name, vocab_parallel.group)
    assert (ours.grad_c is None) == ("c" not in options.get("needed", ("c",)))
    for name in ("c", "bias"):
        grad = ours.named().get(f"grad_{name}")
        assert grad is None or grad.dtype == getattr(problem, name).dtype
    if not vocab_parallel.reduce_e_grad and ours.grad_e is not None:
        dist.all_reduce(ours.grad_e, group=vocab_parallel.group)
    factor = budget_factor(impl, dtype)
    if dtype.itemsize == 2:  # each process rounds its part of dE, and so does their sum
        errors["grad_e"] = max(errors.get("grad_e", 0.0), sum_error(truth.grad_e, dtype))
    floor = kernel_floor if impl in KERNEL_IMPLS else None
    expected = rows_of(truth, vocab_parallel)
    if own.get("return_lse") is False:
        ours = replace(ours, lse=truth.lse)
    assert_within_budget(ours, expected, errors, dtype, factor, gradient_floor=floor)
    return ours


def sum_error(grad, dtype):
    """The most that rounding the parts of a sum and each partial sum can cost."""
    return 0.0 if grad is None else torch.finfo(dtype).eps * dist.get_world_size() * largest(grad)


def assert_same_bits(tensor, name, group=None):
    """The same on every process of the group."""
    first = tensor.detach().clone()
    dist.broadcast(first, group_src=0, group=group)
    assert torch.equal(first, tensor.detach()), f"{name} differs between the processes"
