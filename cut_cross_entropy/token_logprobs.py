"""Log-probabilities, entropy and other sums of each token: what post-training asks of a head."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cut_cross_entropy.arguments import Prepared, prepare
from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET, IGNORE_INDEX
from cut_cross_entropy.dispatch import class_logits, mean_logits, token_outputs
from cut_cross_entropy.distributed.dtensor import refuse_dtensors
from cut_cross_entropy.distributed.options import DataParallelOptions, VocabParallelOptions
from cut_cross_entropy.heads.compiled import outside_graphs_with_heads
from cut_cross_entropy.heads.head import Head
from cut_cross_entropy.options import (
    FilterEps,
    ImplName,
    LinearCrossEntropyImpl,
    impl_name,
)
from cut_cross_entropy.outputs import OUTPUT_NAMES, Asked, OutputName
from cut_cross_entropy.problem import Problem
from cut_cross_entropy.validation import (
    check_class_id_range,
    check_class_ids,
    check_outputs,
    check_top_k,
)


@dataclass(frozen=True)
class TokenLogprobs:
    """Results of :func:`token_logprobs`, None where not asked for.

    All are 0 at ignored tokens, float32 (float64 for float64 inputs) unless said otherwise, and
    have the shape of the targets, less ``shift`` at the end of the last dimension. With the logits
    z of a token, scaled, capped and divided by the temperature, ``p = softmax(z)``.

    Args:
        logprobs: ``log p`` of the target, never above 0. Differentiable.
        mask: bool, False at ignored tokens.
        lse: ``logsumexp(z)``, or over the support of the token. Differentiable.
        entropy: ``-sum p log p`` over all classes, in nats, never below 0. Differentiable.
        mean_logit: mean of z over all classes. Differentiable.
        log_sum_sq: ``log sum p^2`` over all classes. Differentiable.
        candidate_logprobs: (..., K) ``log p`` of the candidates, 0 where there is none (-1), -inf
            outside the token's support. Differentiable.
        rank: int32, number of classes whose logit is higher than the target's, or equal and of a
            lower id: 0 if the target is the likeliest; -1 if its logit is NaN.
        max_logit: the highest z.
        top_ids: (..., k) int64, the likeliest classes, the likeliest first.
        top_logprobs: (..., k) their ``log p`` over all classes.
    """

    logprobs: Tensor
    mask: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq: Tensor | None = None
    candidate_logprobs: Tensor | None = None
    rank: Tensor | None = None
    max_logit: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


@outside_graphs_with_heads
def token_logprobs(
    e: Tensor,
    head: Tensor | Head,
    targets: Tensor,
    *,
    outputs: Collection[OutputName] = (),
    temperature: float | Tensor = 1.0,
    candidates: Tensor | None = None,
    support: Tensor | None = None,
    top_k: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    shift: bool | int = 0,
    impl: ImplName | LinearCrossEntropyImpl = "auto",
    filter_eps: FilterEps = "auto",
    filter_mass: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    vocab_parallel_options: VocabParallelOptions | None = None,
    data_parallel_options: DataParallelOptions | None = None,
) -> TokenLogprobs:
    """Log-probability of each target, and what else is asked for, without storing logits.

    The logits are ``softcap(logit_scale * (e @ head.T + bias)) / temperature``, in float32 and
    never rounded to half precision. What is not asked for is not computed, and without gradients
    nothing is kept for a backward pass.

    Examples:
        >>> hidden = torch.randn(2, 5, 8, requires_grad=True)  # (batch, time, D)
        >>> weight = torch.randn(11, 8)  # (V, D)
        >>> ids = torch.randint(0, 11, (2, 5))
        >>> policy = token_logprobs(hidden, weight, ids, shift=1, outputs=("entropy",))
        >>> policy.logprobs.shape, policy.entropy.shape
        (torch.Size([2, 4]), torch.Size([2, 4]))
        >>> (-(policy.logprobs + 0.01 * policy.entropy).mean()).backward()

    Args:
        e: embeddings, (..., D), float32, bfloat16, float16 or float64; need not be contiguous.
        head: classifier, (V, D), of the dtype of ``e`` (any under autocast); or a
            :class:`~cut_cross_entropy.heads.Head`, which has bias, softcap and scale of its own.
        targets: class ids, int64 or int32, of the leading shape of ``e``; without a shift any
            shape with as many elements.
        outputs: names among ``"lse"``, ``"entropy"``, ``"mean_logit"``, ``"log_sum_sq"``,
            ``"rank"``, ``"max_logit"``.
        temperature: above 0; a number, or a tensor that broadcasts against ``targets``, with which
            it is shifted. Has no gradient.
        candidates: class ids (..., K) for each target, int64 or int32, -1 for none, whose
            log-probabilities to return. Shifted as the targets are.
        support: class ids (..., S) for each target, int64 or int32, padded with -1: the classes
            that probabilities are normalised over, as a sampler kept them. A token whose row is
            empty or lacks its target has all classes.
        top_k: how many of the likeliest classes to return, without a gradient.
        bias: (V,), of the dtype of ``head`` or float32.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before the temperature.
        logit_scale: factor of the logits, before the softcap.
        ignore_index: target value of tokens to leave out.
        shift: position t predicts target t + shift; True is 1.
        impl: as in :func:`linear_cross_entropy`. ``"torch_compile"`` is not available. The kernels
            lack ``top_k`` and the mean of capped logits, and where classes are spread over
            processes all ``outputs`` but ``"lse"``: for them ``"auto"`` is ``"chunked"``, on a GPU
            too.
        filter_eps: as in :func:`linear_cross_entropy`, like all that follow.
        filter_mass: largest probability that the filter may drop, as a mean over tokens.
        memory_budget: bytes of scratch memory beyond results and accumulators.
        vocab_parallel_options: the classes of this process, when they are spread over processes.
        data_parallel_options: how to gather DTensors sharded by ``fully_shard``.

    Returns:
        A :class:`TokenLogprobs`.

    Raises:
        TypeError: an argument or a tensor of the wrong type, layout or dtype.
        ValueError: shapes or devices that do not fit, an option or an unknown name in ``outputs``;
            on the CPU a class id or a temperature out of range. (On a GPU the results of such a
            token are NaN; ``CCE_DEBUG=1`` raises there too.)
        RuntimeError: an explicit ``impl`` that cannot run here.
        NotImplementedError: DTensors whose sharding has no meaning here.
    """
    chosen = impl_name(impl)
    if chosen == "torch_compile":
        raise ValueError(
            "impl='torch_compile' computes losses only: use 'auto', 'chunked' or 'reference'"
        )
    check_outputs(outputs, OUTPUT_NAMES)
    check_top_k(top_k, None)
    refuse_dtensors(candidates=candidates, support=support)
    prepared = prepare(
        e,
        head,
        targets,
        bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        shift=shift,
        filter_eps=filter_eps,
        filter_mass=filter_mass,
        memory_budget=memory_budget,
        vocab_parallel_options=vocab_parallel_options,
        data_parallel_options=data_parallel_options,
    )
    problem = prepared.problem
    num_classes = None if problem.group is not None else problem.c.shape[0]
    check_top_k(top_k, num_classes)
    ids = {}
    for name, given in (("candidates", candidates), ("support", support)):
        if given is not None:
            check_class_ids(name, given, targets)
            if num_classes is not None:
                check_class_id_range(name, given, num_classes)
            ids[name] = prepared.flatten(given.long(), -1)
    with prepared.computing():
        found = _compute(
            prepared,
            chosen,
            outputs,
            ids,
            top_k=top_k,
            filter_eps=filter_eps,
            filter_mass=filter_mass,
        )
    return TokenLogprobs(
        mask=prepared.per_token(problem.targets != ignore_index),
        **{name: prepared.per_token(values) for name, values in found.items()},
    )


def _compute(
    prepared: Prepared,
    impl: str,
    outputs: Collection[str],
    ids: dict[str, Tensor],  # (N, K) candidates, (N, S) support
    top_k: int,
    filter_eps: FilterEps,
    filter_mass: float | None,
) -> dict[str, Tensor]:
    """Results by name, (N,) or (N, K) each."""
    problem = prepared.problem
    # Without a softcap the mean logit needs no walk.
    by_walk = [name for name in outputs if name != "mean_logit" or problem.softcap is not None]
    asked = Asked.of(by_walk, top_k)
    support = None if "support" not in ids else _Support.of(problem, ids["support"])
    walked = problem
    if support is not None and not asked:
        # Nothing but the tokens that have all classes needs the walk.
        skipped = torch.where(support.holds, problem.ignore_index, problem.targets)
        walked = replace(problem, targets=skipped)
    found = token_outputs(
        impl, walked, asked, filter_eps, filter_mass, world_size=prepared.world_size
    )
    nll, lse = found.nll, found.lse
    if support is not None:
        logits = class_logits(impl, problem, support.ids)
        nll, lse = support.normalise(logits, nll, lse)
    results = {"logprobs": -nll}
    if "candidates" in ids:
        candidates = ids["candidates"]
        logprobs = class_logits(impl, problem, candidates) - lse[:, None]
        logprobs = logprobs - logprobs.detach().clamp_min(0)  # a probability is at most 1
        if support is not None:
            logprobs = torch.where(support.lacks(candidates), -torch.inf, logprobs)
        present = (candidates >= 0) & (problem.targets != problem.ignore_index)[:, None]
        results["candidate_logprobs"] = torch.where(present, logprobs, 0)
    if top_k:
        results["top_ids"] = found.top_ids
        results["top_logprobs"] = (found.top_logits - found.lse[:, None]).detach().clamp_max(0)
    for name in outputs:
        if name == "lse":
            results[name] = lse
        elif name == "mean_logit":
            results[name] = (
                mean_logits(impl, problem, None) if not asked.mean_logit else found.mean_logit
            )
        else:
            results[name] = getattr(found, name)
    return results


@dataclass(frozen=True)
class _Support:
    """Classes that the probabilities of each token are normalised over.

    Args:
        ids: (N, S) class ids in rising order, each once; -1 elsewhere.
        is_target: (N, S) whether the class is the target.
        holds: (N,) whether the token has a support; otherwise it has all classes.
    """

    ids: Tensor
    is_target: Tensor
    holds: Tensor

    @classmethod
    def of(cls, problem: Problem, ids: Tensor) -> "_Support":
        ids = ids.sort(dim=1).values
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        ids = torch.where(repeated, -1, ids)
        kept = problem.targets != problem.ignore_index
        is_target = (ids == problem.targets[:, None]) & (ids >= 0) & kept[:, None]
        return cls(ids, is_target, is_target.any(1))

    def normalise(self, logits: Tensor, nll: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and log-sum-exp over the support, or as given of tokens that have none."""
        target = torch.where(self.is_target, logits, 0).sum(1)
        # A finite number without weight, where -inf alone would have a gradient of NaN.
        nothing = (target.detach() - 1e4)[:, None]
        is_other = (self.ids >= 0) & ~self.is_target
        others = torch.where(is_other, logits, nothing).logsumexp(1) if logits.shape[1] else target
        ahead = others - target
        # Never below 0, and precise where the target has nearly all of the probability.
        own_nll = torch.logaddexp(ahead, torch.zeros_like(ahead))
        nll = torch.where(self.holds, own_nll, nll)
        return nll, torch.where(self.holds, target + own_nll, lse)

    def lacks(self, ids: Tensor) -> Tensor:
        """Return whether the token has a support and a class (N, K) is not in it."""
        if self.ids.shape[1] == 0:
            return torch.zeros_like(ids, dtype=torch.bool)
        rising = self.ids.sort(dim=1).values
        place = torch.searchsorted(rising, ids).clamp_max(rising.shape[1] - 1)
        return self.holds[:, None] & (rising.gather(1, place) != ids)
