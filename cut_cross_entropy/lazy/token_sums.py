"""Log-probabilities, entropies and other sums over classes, as trainers compute them from logits.

They are recognised where a trainer gets the lazy logits of a whole model:

- ``log_softmax`` or ``softmax`` over the classes, then ``gather`` of class ids;
- ``logsumexp`` and ``mean`` over the classes, ``gather`` of logits;
- entropies: ``logsumexp - (softmax * logits).sum``, ``-(log_p.exp() * log_p).sum``.

A softmax is recorded, so that anything else that is done to it computes it from the logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.arguments import Prepared, prepare
from cut_cross_entropy.constants import DEFAULT_MEMORY_BUDGET
from cut_cross_entropy.device_support import current_autocast
from cut_cross_entropy.dispatch import class_logits, mean_logits
from cut_cross_entropy.lazy.operations import record, without_grad
from cut_cross_entropy.lazy.recipe import (
    CAST,
    EXP,
    LOG_SOFTMAX,
    SCALE,
    SOFTMAX,
    TIMES,
    Folded,
    Recipe,
    Step,
    fold,
    is_foldable,
)
from cut_cross_entropy.lazy.record import saved_tensors_hooks
from cut_cross_entropy.lazy.value import LazyValue, View
from cut_cross_entropy.outputs import OutputName
from cut_cross_entropy.token_logprobs import token_logprobs

_LOGITS, _MEAN_LOGIT, _MINUS_ENTROPY = "logits", "mean logit", "minus entropy"
_NEVER = -(2**31)
"""A target value to ignore that no trainer uses: an id that is no class is an error, as there."""


def summarise(name: str, lazy: LazyValue, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Record a softmax of logits, or compute a sum over their classes without them.

    Returns:
        A tensor; lazy values, one or a tuple; or ``NotImplemented`` for what is not recognised.
    """
    if not torch.is_grad_enabled():
        lazy, *args = [without_grad(value) for value in (lazy, *args)]
    return _FUNCTIONS[name](lazy, *args, **kwargs)


def _softmax_of(step: str) -> Callable[..., Any]:
    def recorded(
        lazy: LazyValue,
        dim: Any = None,
        dtype: torch.dtype | None = None,
        _stacklevel: int = 3,
    ) -> Any:
        if not _is_last(lazy, dim) or _kind_of(lazy.recipe) != _LOGITS:
            return NotImplemented
        dtype = dtype or _at_least_single(lazy)
        _whole(lazy)[0].has_softmax |= step == SOFTMAX
        result = lazy.derived(lazy.recipe.then(step, dtype), dtype=dtype)
        result.source = lazy
        return result

    return recorded


def _exp(lazy: LazyValue) -> Any:
    if _kind_of(lazy.recipe) != LOG_SOFTMAX:
        return NotImplemented
    result = lazy.derived(lazy.recipe.then(EXP))
    result.source = lazy.source
    return result


def _times(lazy: LazyValue, other: Any) -> Any:
    """Record the product of probabilities with their logits, or with their logarithms."""
    if not isinstance(other, LazyValue) or lazy.shape != other.shape:
        return NotImplemented
    first, second = (lazy, other) if lazy.recipe.is_normalised else (other, lazy)
    start = _start(first.recipe)
    if start is None or first.device != second.device:
        return NotImplemented
    steps = second.recipe.steps
    if not _is_same(_until(first.recipe, start), _until(second.recipe, start)):
        return NotImplemented
    recipe = first.recipe.then(TIMES, steps[start:])
    if _kind_of(recipe) is None:
        return NotImplemented
    result = first.derived(recipe, dtype=torch.promote_types(first.dtype, second.dtype))
    second.note_use()
    result.source = first.source
    return result


def _logsumexp(lazy: LazyValue, dim: Any, keepdim: bool = False) -> Any:
    if not _is_last(lazy, dim) or not _is_known(lazy, _LOGITS):
        return NotImplemented
    return _result(_lse_and_entropy(lazy, False)[0], _at_least_single(lazy), keepdim)


def _sum(lazy: LazyValue, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """Sum probabilities times logits, or times log-probabilities."""
    kind = _kind_of(lazy.recipe)
    if dtype is not None or not _is_last(lazy, dim) or not _is_known(lazy, kind):
        return NotImplemented
    if kind not in (_MEAN_LOGIT, _MINUS_ENTROPY):
        return NotImplemented
    lse, entropy = _lse_and_entropy(lazy, True)
    total = lse - entropy if kind == _MEAN_LOGIT else -entropy
    return _result(total, _at_least_single(lazy), keepdim)


def _mean(lazy: LazyValue, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if dtype is not None or not _is_known(lazy, _LOGITS):
        return NotImplemented
    if dim is not None and not _is_last(lazy, dim):
        return NotImplemented
    if dim is None and keepdim:
        return NotImplemented

    def mean(folded: Folded, options: dict[str, Any]) -> Tensor:
        prepared = _prepare(folded, options)
        with prepared.computing():
            return prepared.per_token(mean_logits(options["impl"], prepared.problem, None))

    result = _compute(lazy, mean)
    return _result(result if dim is not None else result.mean(), lazy.dtype, keepdim)


def _nansum(lazy: LazyValue) -> Any:
    """Sum all logits, if none is NaN."""
    mean = _mean(lazy)
    if mean is NotImplemented or mean.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    return NotImplemented if bool(mean.isnan()) else mean * lazy.numel()


def _gather(lazy: LazyValue, dim: Any, index: Any, sparse_grad: bool = False) -> Any:
    """Gather logits, log-probabilities or probabilities of class ids."""
    kind = _kind_of(lazy.recipe)
    if (
        sparse_grad
        or kind not in (_LOGITS, LOG_SOFTMAX, SOFTMAX)
        or not _is_last(lazy, dim)
        or not _is_known(lazy, kind)
        or type(index) is not Tensor
        or index.dtype != torch.int64
        or index.ndim != lazy.ndim
        or index.shape[:-1] != lazy.shape[:-1]
        or index.shape[-1] == 0
        or index.device != lazy.device
    ):
        return NotImplemented
    if index.device.type == "cpu" and index.numel():
        low, high = index.aminmax()
        if low < 0 or high >= lazy.num_classes:
            return NotImplemented  # for the error of the function that was called

    def logits(folded: Folded, options: dict[str, Any]) -> Tensor:
        prepared = _prepare(folded, options)
        with prepared.computing():
            ids = index.to(folded.e.device).reshape(-1, index.shape[-1])
            found = class_logits(options["impl"], prepared.problem, ids)
            return found.reshape(index.shape)

    def logprobs(folded: Folded, options: dict[str, Any]) -> Tensor:
        ids = index.to(folded.e.device)
        one = ids.shape[-1] == 1
        found = token_logprobs(
            folded.e,
            folded.c,
            ids[..., 0],
            candidates=None if one else ids,
            ignore_index=_NEVER,
            **_arguments(folded),
            **options,
        )
        result = found.logprobs[..., None] if one else found.candidate_logprobs
        assert result is not None
        return result

    result = _compute(lazy, logits if kind == _LOGITS else logprobs)
    return (result.exp() if kind == SOFTMAX else result).to(lazy.dtype)


def _unbind(lazy: LazyValue, dim: int = 0) -> Any:
    if dim != 0 or lazy.ndim < 2:
        return NotImplemented
    rows = [record("__getitem__", lazy, (row,), {}) for row in range(lazy.shape[0])]
    return NotImplemented if any(row is NotImplemented for row in rows) else tuple(rows)


def _split(lazy: LazyValue, split_size: Any, dim: int = 0) -> Any:
    if not isinstance(dim, int) or not -lazy.ndim <= dim < lazy.ndim or _is_last(lazy, dim):
        return NotImplemented
    ranges = torch.empty(lazy.shape[dim], device="meta").split(split_size)
    parts, start = [], 0
    for part in ranges:
        parts.append(record("narrow", lazy, (dim, start, len(part)), {}))
        start += len(part)
    return NotImplemented if any(part is NotImplemented for part in parts) else tuple(parts)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": _softmax_of(SOFTMAX),
    "log_softmax": _softmax_of(LOG_SOFTMAX),
    "exp": _exp,
    "mul": _times,
    "logsumexp": _logsumexp,
    "sum": _sum,
    "mean": _mean,
    "nansum": _nansum,
    "gather": _gather,
    "unbind": _unbind,
    "split": _split,
}
SUMMARIES = frozenset(_FUNCTIONS)
"""Names of the functions and methods that :func:`summarise` takes."""


def _is_last(lazy: LazyValue, dim: Any) -> bool:
    """Return whether ``dim`` names the classes alone."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, lazy.ndim - 1)


def _start(recipe: Recipe) -> int | None:
    """Return the index of the step that normalises."""
    for index, (name, _) in enumerate(recipe.steps):
        if name in (SOFTMAX, LOG_SOFTMAX):
            return index
    return None


def _until(recipe: Recipe, start: int) -> Recipe:
    return Recipe(recipe.terms, recipe.bias, recipe.steps[:start])


def _logits_of(recipe: Recipe) -> Recipe:
    """Return the recipe of the logits that were normalised, or the recipe itself."""
    start = _start(recipe)
    return recipe if start is None else _until(recipe, start)


def _kind_of(recipe: Recipe) -> str | None:
    """Return what the steps after the logits make of them, or None if it has no name."""
    start = _start(recipe)
    return _LOGITS if start is None else _kind(recipe.steps[start:])


def _kind(steps: tuple[Step, ...]) -> str | None:
    kind: str | None = _LOGITS
    for name, value in steps:
        if name == CAST:
            continue
        if name in (SOFTMAX, LOG_SOFTMAX) and kind == _LOGITS:
            kind = name
        elif name == EXP and kind == LOG_SOFTMAX:
            kind = SOFTMAX
        elif name == TIMES and kind in (SOFTMAX, LOG_SOFTMAX):
            pair = {kind, _kind(value)}
            if pair == {SOFTMAX, _LOGITS}:
                kind = _MEAN_LOGIT
            elif pair == {SOFTMAX, LOG_SOFTMAX}:
                kind = _MINUS_ENTROPY
            else:
                return None
        else:
            return None
    return kind


def _is_same(left: Recipe, right: Recipe) -> bool:
    """Return whether two recipes give the same logits, with the same gradient."""
    return (
        left.bias is right.bias
        and len(left.terms) == len(right.terms)
        and len(left.steps) == len(right.steps)
        and all(
            c is other_c and constant == other_constant and _is_same_tensor(e, other_e)
            for (e, c, constant), (other_e, other_c, other_constant) in zip(
                left.terms, right.terms, strict=True
            )
        )
        and all(
            name == other_name
            and (value is other or (not isinstance(value, Tensor) and value == other))
            for (name, value), (other_name, other) in zip(left.steps, right.steps, strict=True)
        )
    )


def _is_same_tensor(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors are the same, or the same view of one."""
    return left is right or (
        left.data_ptr() == right.data_ptr()
        and left.shape == right.shape
        and left.stride() == right.stride()
        and left.dtype == right.dtype
        and left.requires_grad == right.requires_grad
        and (not left.requires_grad or (left._base is not None and left._base is right._base))
    )


def _is_known(lazy: LazyValue, kind: str | None) -> bool:
    """Return whether the operators compute something of this kind."""
    recipe = lazy.recipe
    if kind is None or recipe.is_divided or not lazy.numel():
        return False
    if lazy.call.record.options.to_kwargs()["impl"] == "torch_compile":
        return False  # which computes losses only
    logits = _logits_of(recipe)
    has_scale = not any(name == SCALE and value == 0 for name, value in logits.steps)
    return _kind_of(recipe) == kind and has_scale and is_foldable(logits)


def _at_least_single(lazy: LazyValue) -> torch.dtype:
    """Return the dtype of a softmax or a sum: float32 at least under autocast of a GPU."""
    if lazy.device.type == "cpu" or current_autocast(lazy.device.type) is None:
        return lazy.dtype
    return torch.promote_types(lazy.dtype, torch.float32)


def _result(values: Tensor, dtype: torch.dtype, keepdim: bool) -> Tensor:
    values = values.to(dtype)
    return values.unsqueeze(-1) if keepdim else values


def _arguments(folded: Folded) -> dict[str, Any]:
    return {
        "bias": folded.bias,
        "softcap": folded.softcap,
        "logit_scale": folded.logit_scale,
    }


def _targets(folded: Folded) -> Tensor:
    """Return targets for what does not depend on them."""
    return torch.zeros(folded.e.shape[:-1], dtype=torch.int64, device=folded.e.device)


def _prepare(folded: Folded, options: dict[str, Any]) -> Prepared:
    return prepare(
        folded.e,
        folded.c,
        _targets(folded),
        ignore_index=_NEVER,
        shift=0,
        temperature=1.0,
        memory_budget=options["memory_budget"],
        vocab_parallel_options=None,
        data_parallel_options=None,
        **_arguments(folded),
    )


def _compute(lazy: LazyValue, function: Callable[[Folded, dict[str, Any]], Tensor]) -> Tensor:
    """Return ``function`` of the arguments of an operator that give the logits."""
    call = lazy.call
    given = call.record.options.to_kwargs()
    exact = not (given.get("filter_e_grad", True) and given.get("filter_c_grad", True))
    options = {
        "impl": given["impl"],
        "filter_eps": None if exact else given["filter_eps"],
        "filter_mass": given.get("filter_mass"),
        "memory_budget": given.get("memory_budget", DEFAULT_MEMORY_BUDGET),
    }

    def compute(recipe: Recipe) -> Tensor:
        folded = fold(recipe, with_scale=True)
        e, c = folded.e, folded.c
        if isinstance(c, Tensor) and e.dtype != c.dtype and current_autocast(e.device.type) is None:
            folded.e = e.to(c.dtype)
        return function(folded, options)

    result = call.compute(_logits_of(lazy.recipe), compute)
    call.record.note_loss(call.uses)
    if torch.is_grad_enabled():
        lazy.note_use()
    return result if result.device == lazy.device else result.to(lazy.device)


def _lse_and_entropy(lazy: LazyValue, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp and the entropy of each token, the latter only if asked for.

    Trainers ask for the sums of a batch part by part, and for one after the other. They are
    computed for the whole batch, once, and both where a softmax was recorded.
    """
    source = lazy
    if lazy.source is not None and _is_same(lazy.source.recipe, _logits_of(lazy.recipe)):
        source = lazy.source
    whole, views = _whole(source)
    record = lazy.call.record
    # A checkpoint counts what is saved inside of it, and would miss what was computed before.
    may_keep = saved_tensors_hooks() == record.saved_tensors_hooks
    mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    kept = whole.sums
    if (
        kept is None
        or not may_keep
        or kept[0] is not whole.recipe
        or kept[1] != mode
        or len(kept[2]) < 1 + with_entropy
    ):
        both = with_entropy or (may_keep and whole.has_softmax)
        kept = (whole.recipe, mode, _compute_sums(whole, both))
        if may_keep:
            whole.sums = kept
    sums = kept[2]
    for view in views:  # of the tokens: the classes stay a dimension of their own
        sums = tuple([view(each.unsqueeze(-1)).squeeze(-1) for each in sums])
    return sums[0], sums[-1]


def _compute_sums(lazy: LazyValue, with_entropy: bool) -> tuple[Tensor, ...]:
    names: tuple[OutputName, ...] = ("lse", "entropy") if with_entropy else ("lse",)

    def sums(folded: Folded, options: dict[str, Any]) -> Tensor:
        found = token_logprobs(
            folded.e,
            folded.c,
            _targets(folded),
            outputs=names,
            ignore_index=_NEVER,
            **_arguments(folded),
            **options,
        )
        return torch.stack([getattr(found, name) for name in names])

    return _compute(lazy, sums).unbind(0)


def _is_part(lazy: LazyValue) -> bool:
    """Return whether these are all tokens of the logits they are a view of, or some rows."""
    base = lazy.base
    return (
        base is not None
        and base.num_classes == lazy.num_classes
        and base.requires_grad == lazy.requires_grad
        and (lazy.numel() == base.numel() or base.shape[1:] in (lazy.shape, lazy.shape[1:]))
    )


def _whole(lazy: LazyValue) -> tuple[LazyValue, list[View]]:
    """Return the logits that the sums of ``lazy`` are computed with, and the views from there."""
    views: list[View] = []
    while _is_part(lazy):
        assert lazy.base is not None
        views.insert(0, lazy.views[-1])
        lazy = lazy.base
    return lazy, views
