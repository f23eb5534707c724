"""Chooses the implementation of a call and says what can run where."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cut_cross_entropy.budget import powers_per_chunk
from cut_cross_entropy.call_context import is_offloaded, is_traced, is_transformed, plain
from cut_cross_entropy.device_support import (
    autocast_type,
    kernels_unavailable,
    relative_throughput,
    triton_is_interpreted,
)
from cut_cross_entropy.distributed.collectives import combine_shards
from cut_cross_entropy.heads import adapted, chunks, sums
from cut_cross_entropy.heads.chunks import HeadProblem
from cut_cross_entropy.implementations import chunked_sum, full_logits, reference
from cut_cross_entropy.operators.losses import run_chunked, run_kernels
from cut_cross_entropy.operators.sums import run_sum
from cut_cross_entropy.operators.token_outputs import (
    mean_logits_of_rank_one,
    run_class_logits,
    run_kernel_outputs,
    run_outputs,
    sum_shards,
)
from cut_cross_entropy.options import KERNEL_IMPLS, CCEPreset, CCEPresets, FilterEps
from cut_cross_entropy.outputs import Asked, TokenOutputs
from cut_cross_entropy.problem import NO_FILTER, Filter, Needed, PerToken, Problem
from cut_cross_entropy.validation import check_target_range

FILTER_TOLERANCE = 4e-4
"""Root of the dropped energy, relative to that of the gradient, for ``filter_eps="auto"``.

Where the error is estimated on a sample (``kernels.filtered.calibrate``) the threshold starts here;
elsewhere it stays here, which is enough for the data of docs/engineering_log.md."""

FEW_PRODUCTS = 2.4e11
"""Products of ``e @ c.T`` (N V D) up to which ``"auto"`` computes a sum without the filter, on an
H200 or H100.

Both are limited by the host's launches there, and the exact sum of few tokens has fewer. Measured:
0.68 to 0.78 of the filter's time at 1.3e11 to 1.6e11, 0.86 at 2.3e11 in a training loop, about 1.2
at 3.2e11 (docs/engineering_log.md)."""

FEW_PRODUCTS_BY_HALF = 2.5e12
"""Products of ``e @ c.T`` (N V D) up to which a sum whose one gradient is exact has both exact.

Measured on an H200, 1 GiB, time by that of the exact sum: 1.18 at 8e11, 1.17 at 1.3e12, 1.14 to
1.19 at 1.4e12, 0.82 at 4.3e12, 0.88 to 0.94 at 4.8e12 (docs/engineering_log.md)."""

MAX_ERROR: dict[object, float] = {"auto": 1.0, "high": 0.5}
"""Error of dE that the tail may make by ``filter_eps``, in multiples of bfloat16's rounding error.

Rounding the logit gradients and the result makes 1.25 to 1.7 in bfloat16, the more the less tokens
weigh that are unsure, so both together make 1.6 to 2 (docs/numerics.md). The error is estimated on
a sample of each step (``kernels.filtered.calibrate``)."""

MOST_DROPPED = 0.02
"""Probability that a token may leave to the tail, in the mean, by ``"auto"`` and ``"high"``.

Of more the gradients are computed in full. Young models drop a tenth, and learned rare classes
worse by the filter; trained ones drop 0.2 to 0.6 % (docs/engineering_log.md)."""

FULL_IMPLS = {"reference": reference, "torch_compile": full_logits}
"""Implementations of full logits, which PyTorch differentiates."""

AUTO_EPS = 2.0**-12
"""Apple's threshold for bfloat16 under "auto": a float ``filter_eps`` scales with it."""


def choose_impl(
    impl: str, device: torch.device, compute_dtype: torch.dtype, of_losses: bool = True
) -> str:
    """The implementation that ``impl`` means for tensors on ``device``.

    An explicit name is returned as it is or refused; only ``"auto"`` chooses. The presets of the
    kernels run float32 and float64 as ``"chunked"``: full precision products are the library's.

    Args:
        impl: name of the implementation.
        device: of the tensors.
        compute_dtype: of the products.
        of_losses: whether a loss is wanted, which ``"torch_compile"`` computes and nothing else.

    Raises:
        RuntimeError: ``impl`` cannot run there.
    """
    half = compute_dtype in (torch.bfloat16, torch.float16)
    if impl == "auto":
        usable = half and device.type == "cuda" and kernels_unavailable(device) is None
        return "cce" if usable else "chunked"
    if impl not in KERNEL_IMPLS:
        return impl
    unavailable = kernels_unavailable(device)
    if unavailable is None and triton_is_interpreted() and compute_dtype == torch.bfloat16:
        unavailable = "Triton's interpreter computes bfloat16 products wrongly"
    if unavailable is not None:
        others = "'chunked', 'torch_compile'" if of_losses else "'chunked'"
        raise RuntimeError(
            f"impl={impl!r} cannot run here: {unavailable}. "
            f"On {device.type} use impl='auto', {others} or 'reference'"
        )
    if half or (triton_is_interpreted() and compute_dtype == torch.float32):
        return impl
    return "chunked"


def filter_tolerance(filter_eps: float | str | None) -> float:
    """Convert ``filter_eps`` to the tolerance of the kernels' filter; 0 turns it off.

    ``"auto"`` is FILTER_TOLERANCE, ``"high"`` half of it, a float is scaled so that AUTO_EPS
    equals ``"auto"``.
    """
    if filter_eps is None:
        return 0.0
    if filter_eps == "auto":
        return FILTER_TOLERANCE
    if filter_eps == "high":
        return FILTER_TOLERANCE / 2
    return FILTER_TOLERANCE * float(filter_eps) / AUTO_EPS


def token_losses(
    impl: str,
    problem: Problem,
    kernel_options: CCEPreset,
    *,
    filter_mass: float = 1.0,
    world_size: int = 1,
) -> PerToken:
    """Loss and log-sum-exp of every token, each (N,), 0 for ignored tokens.

    With a ``group`` the rows of ``c`` and ``bias`` are the classes of one shard; the results are
    those of all classes, and the gradient of ``e`` is the part that these classes have in it.

    Args:
        impl: an implementation, or ``"auto"``.
        problem: the inputs.
        kernel_options: the caller's options of the kernels, of which a preset may fix some.
        filter_mass: see :func:`linear_cross_entropy`.
        world_size: processes of the group.
    """
    impl = choose_impl(impl, problem.e.device, problem.compute_dtype)
    if isinstance(problem, HeadProblem):
        if impl in KERNEL_IMPLS:
            filter_ = _filter(impl, kernel_options, filter_mass, world_size)
            if adapted.is_adapted(problem) or adapted.is_made(problem, filter_):
                return adapted.token_losses(problem, filter_)
            return sums.token_losses(problem)
        shares = len(problem.chunks())  # of what the filter may drop
        return chunks.token_losses(
            problem,
            lambda part: token_losses(
                impl, part, kernel_options, filter_mass=filter_mass, world_size=shares
            ),
        )
    if problem.group is not None and impl in FULL_IMPLS and problem.c.shape[0] == 0:
        impl = "chunked"  # the sums of full logits need a class; the results are the same
    if torch.compiler.is_compiling() and impl not in FULL_IMPLS and is_transformed():
        raise NotImplementedError(
            f"impl={impl!r} cannot be transformed by torch.func or differentiated in forward mode "
            "within torch.compile; use impl='reference' there, or do not compile it"
        )
    if impl == "chunked":
        return run_chunked(problem)
    if impl in KERNEL_IMPLS:
        return run_kernels(problem, _filter(impl, kernel_options, filter_mass, world_size))
    return _full_losses(impl, problem)


def _filter(impl: str, kernel_options: CCEPreset, filter_mass: float, world_size: int) -> Filter:
    """Return what a preset of the kernels may skip on each process."""
    preset = CCEPresets.build_for_impl(impl, kernel_options)
    # Each process drops its own strips; the budget is one for all of them, and energies add.
    return Filter(
        tolerance=filter_tolerance(preset["filter_eps"]) / math.sqrt(world_size),
        max_mass=filter_mass / world_size,
        e=preset["filter_e_grad"],
        c=preset["filter_c_grad"],
        max_error=0.0 if world_size > 1 else MAX_ERROR.get(preset["filter_eps"], 0.0),
        most_dropped=MOST_DROPPED / world_size if preset["filter_eps"] in MAX_ERROR else 1.0,
    )


def sum_of_losses(
    impl: str,
    problem: Problem,
    kernel_options: CCEPreset,
    *,
    weights: Tensor | None = None,
    recompute: bool = False,
    keep_inputs: bool = True,
    filter_mass: float = 1.0,
    world_size: int = 1,
) -> Tensor:
    """Sum of the losses of all tokens, ().

    Args:
        impl, problem, kernel_options, filter_mass, world_size: see :func:`token_losses`.
        weights: (N,) of dtype :attr:`Problem.wide`, factors of the losses, 0 for ignored tokens;
            None for 1.
        recompute: compute no gradient in the forward.
        keep_inputs: whether autograd may save ``problem.e``, ``.c`` and ``.bias`` where they are
            not needed; see :func:`cut_cross_entropy.operators.sums.run_sum`.
    """
    needed = gradients_needed(problem)
    # Gradients that are saved would be copied to the host and back where activations are.
    recompute = recompute or is_transformed() or is_offloaded()
    if isinstance(problem, HeadProblem) and not recompute:
        chosen = choose_impl(impl, problem.e.device, problem.compute_dtype)
        if chosen in KERNEL_IMPLS and not adapted.is_adapted(problem):
            filter_ = _filter(chosen, kernel_options, filter_mass, world_size)
            is_small_sum = impl == "auto" and has_at_most(FEW_PRODUCTS, problem)
            is_exact = is_small_sum or not adapted.is_made(problem, filter_)
            if is_exact and sums.takes_one_pass(problem, weights):
                return sums.sum_of_losses(problem, weights)
    # The gradient of a weight is the loss of its token, which a sum does not return.
    is_plain = not isinstance(problem, HeadProblem)
    is_plain = is_plain and not (weights is not None and weights.requires_grad)
    # Shards differ in size, and in what is trained, and must not choose by that: they would wait
    # for each other in different collectives. Their operators agree on a chunk.
    is_shard = problem.group is not None
    is_wanted = torch.is_grad_enabled() if is_shard else any(needed.flat())
    if is_wanted and is_plain and not recompute:
        chosen = choose_impl(impl, problem.e.device, problem.compute_dtype)
        if chosen == "chunked" and (is_shard or chunked_sum.tokens_per_chunk(problem, needed)):
            return run_sum(problem, needed, weights, None, keep_inputs=keep_inputs)
        if chosen in KERNEL_IMPLS:
            filter_ = _filter(chosen, kernel_options, filter_mass, world_size)
            if not is_shard and impl == "auto" and is_small(problem):
                filter_ = NO_FILTER
            exact, filtered = (any(part.flat()) for part in filter_.split(needed))
            if is_shard:
                takes_one_pass = not filter_.is_on
            else:
                takes_one_pass = exact and powers_per_chunk(problem, needed) > 0
            if takes_one_pass:
                if filtered and has_at_most(FEW_PRODUCTS_BY_HALF, problem):
                    filter_ = NO_FILTER
                return run_sum(problem, needed, weights, filter_, keep_inputs=keep_inputs)
    results = token_losses(
        impl, problem, kernel_options, filter_mass=filter_mass, world_size=world_size
    )
    return (results.nll if weights is None else results.nll * weights).sum()


def is_small(problem: Problem) -> bool:
    """Whether a sum takes less time without the filter: by the host's launches, not the products.

    Known from the shapes and the device. The sums of the gradients, which are in float32 and kept
    until the backward, have to fit the budget.
    """
    num_rows, dim = problem.e.shape[0] + problem.c.shape[0], problem.e.shape[1]
    fitting = num_rows * dim * 4 <= problem.memory_budget
    return fitting and has_at_most(FEW_PRODUCTS, problem)


def has_at_most(products: float, problem: Problem) -> bool:
    """Whether ``e @ c.T`` has at most so many products, in proportion to the device's speed."""
    (num_tokens, dim), num_classes = problem.e.shape, problem.c.shape[0]
    most = products * relative_throughput(problem.e.device)
    return num_tokens * num_classes * dim <= most


def gradients_needed(problem: Problem) -> Needed:
    """Return the gradients that a backward pass may ask for."""
    return Needed(
        *(
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (problem.e, problem.c, problem.bias)
        )
    )


def _check_targets(problem: Problem) -> None:
    if problem.group is None and not (torch.compiler.is_compiling() or is_traced()):
        check_target_range(plain(problem.targets), problem.c.shape[0], problem.ignore_index)


def _full_losses(impl: str, problem: Problem) -> PerToken:
    """The same by an implementation of full logits."""
    _check_targets(problem)
    full: Callable[[Problem], tuple[Tensor, Tensor]] = FULL_IMPLS[impl].target_logits_and_lse
    kept = problem.targets != problem.ignore_index
    # compute_dtype has its say already.
    with torch.autocast(autocast_type(problem.e.device), enabled=False):
        logit, lse = full(problem)
        if problem.group is not None:
            logit, lse = combine_shards(logit, lse, problem.group)
        nll = torch.where(logit == torch.inf, torch.nan, lse - logit)
        return PerToken(torch.where(kept, nll, 0), torch.where(kept, lse, 0))


def token_outputs(
    impl: str,
    problem: Problem,
    asked: Asked,
    filter_eps: FilterEps = "auto",
    filter_mass: float | None = None,
    *,
    weights: Tensor | None = None,
    world_size: int = 1,
) -> TokenOutputs:
    """Loss, log-sum-exp and the sums that are asked for, of every token.

    Args:
        impl: an implementation other than ``"torch_compile"``, or ``"auto"``.
        problem: the inputs.
        asked: the sums to compute.
        filter_eps, filter_mass: see :func:`linear_cross_entropy`.
        weights: (V,) of the classes in the mean logit; by default they are equal.
        world_size: processes that share the classes.

    Raises:
        RuntimeError: kernels that lack what is asked for, named explicitly.
    """
    if asked.mean_logit and weights is None:
        weights = equal_weights(problem)
    if isinstance(problem, HeadProblem):
        shares = len(problem.chunks())

        def of_chunk(part: Problem, some: Asked, own: Tensor | None) -> TokenOutputs:
            return token_outputs(
                impl, part, some, filter_eps, filter_mass, weights=own, world_size=shares
            )

        logits_of = lambda whole, ids: class_logits(impl, whole, ids)
        return chunks.token_outputs(problem, asked, weights, of_chunk, logits_of)
    if impl == "reference":
        _refuse_shards(problem)
        _check_targets(problem)
        with torch.autocast(autocast_type(problem.e.device), enabled=False):
            logits = reference.all_logits(problem)
            return reference.token_outputs(problem, logits, asked, weights)
    chosen = choose_impl(impl, problem.e.device, problem.compute_dtype, of_losses=False)
    by_kernels = chosen in KERNEL_IMPLS and not _beyond_kernels(problem, asked)
    if chosen in KERNEL_IMPLS and impl != "auto" and not by_kernels:
        raise RuntimeError(
            f"impl={impl!r} does not compute {_beyond_kernels(problem, asked)}; use impl='auto' or "
            "'chunked'"
        )
    if not by_kernels:
        return run_outputs(problem, asked, weights)
    options: CCEPreset = {
        "filter_eps": filter_eps,
        "accum_e_fp32": True,
        "accum_c_fp32": True,
        "filter_e_grad": True,
        "filter_c_grad": True,
    }
    mass = 1.0 if filter_mass is None else float(filter_mass)
    filter_ = _filter(chosen, options, mass, world_size)
    if asked:
        return run_kernel_outputs(problem, asked, filter_)
    nll, lse = run_kernels(problem, filter_)
    nothing = lse.new_empty(0)
    no_class = lse.new_empty((lse.shape[0], 0))
    return TokenOutputs(
        nll,
        lse,
        entropy=nothing,
        log_sum_sq=nothing,
        mean_logit=nothing,
        rank=nothing.int(),
        max_logit=nothing,
        top_ids=no_class.long(),
        top_logits=no_class,
    )


def _beyond_kernels(problem: Problem, asked: Asked) -> str | None:
    """Name what the kernels do not compute, or return None."""
    if asked.mean_logit:
        return "the mean of capped logits"
    if asked.top_k:
        return "the likeliest classes (top_k)"
    if asked and problem.group is not None:
        return "sums other than the loss where classes are spread over processes"
    return None


def class_logits(impl: str, problem: Problem, ids: Tensor) -> Tensor:
    """Logits of the classes ``ids`` (N, K) of each token, 0 for ignored tokens and negative ids."""
    if isinstance(problem, HeadProblem):
        return chunks.class_logits(problem, ids, lambda part, own: class_logits(impl, part, own))
    if impl != "reference":
        return run_class_logits(problem, ids)
    num_classes = problem.c.shape[0]
    kept = (problem.targets != problem.ignore_index)[:, None] & (ids >= 0)
    with torch.autocast(autocast_type(problem.e.device), enabled=False):
        logits = reference.all_logits(problem).gather(1, ids.clamp(0, num_classes - 1))
    return torch.where(kept, torch.where(ids < num_classes, logits, torch.nan), 0)


def mean_logits(impl: str, problem: Problem, weights: Tensor | None) -> Tensor:
    """Mean logit of every token, weighted by ``weights`` (V,); by default they are equal."""
    if weights is None:
        weights = equal_weights(problem)
    if isinstance(problem, HeadProblem):
        return chunks.mean_logits(problem, weights, lambda part, own: mean_logits(impl, part, own))
    if impl in KERNEL_IMPLS or problem.group is not None:
        impl = "auto"  # the kernels have no walk with other sums, the reference no shards
    if problem.softcap is None and impl != "reference":
        return mean_logits_of_rank_one(problem, weights)
    return token_outputs(impl, problem, Asked(mean_logit=True), weights=weights).mean_logit


def equal_weights(problem: Problem) -> Tensor:
    """Weights (V,) of a mean over all classes, those of other processes included."""
    num_classes = problem.c.shape[0]
    count = problem.e.new_full((1,), num_classes, dtype=problem.wide)
    if problem.group is not None:
        count = sum_shards(count, problem.group)
    return (1 / count).expand(num_classes).contiguous()


def _refuse_shards(problem: Problem) -> None:
    if problem.group is not None:
        raise ValueError(
            "impl='reference' of token_logprobs needs all classes: use 'auto' or 'chunked' where "
            "they are spread over processes"
        )
