"""Random uses of ``linear_cross_entropy`` under transforms, against ``impl="reference"``.

``python -m tests.random_transforms --count 1000 --seed 1`` prints what came of them; ``--index``
runs a single one. All in float64.
"""

import argparse
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import cut_cross_entropy
from cut_cross_entropy import LinearCrossEntropy, linear_cross_entropy

PACKAGE = str(Path(cut_cross_entropy.__file__).parent)
TOLERANCE = 1e-10

Loss = Callable[..., Tensor]
Transform = Callable[[Loss, Tensor, Tensor, Tensor], Any]


def _with_grad(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def _grads(total: Tensor, inputs: list[Tensor], **options: Any) -> Any:
    return torch.autograd.grad(total, inputs, allow_unused=True, **options)


def _twice(f: Loss, e: Tensor, c: Tensor, b: Tensor) -> Any:
    inputs = _with_grad(e, c, b)
    total = f(*inputs).sum()
    first = _grads(total, inputs[1:2], retain_graph=True)
    total.backward()
    return first, [x.grad for x in inputs]


def _checkpointed(use_reentrant: bool) -> Transform:
    def transform(f: Loss, e: Tensor, c: Tensor, b: Tensor) -> Any:
        inputs = _with_grad(e, c, b)
        loss = checkpoint(lambda e, c, b: f(e * 2, c, b), *inputs, use_reentrant=use_reentrant)
        loss.sum().backward()
        return loss.detach(), [x.grad for x in inputs]

    return transform


def _dual(names: str) -> Transform:
    def transform(f: Loss, e: Tensor, c: Tensor, b: Tensor) -> Any:
        with forward_ad.dual_level():
            inputs = [
                forward_ad.make_dual(x, torch.ones_like(x)) if name in names else x
                for name, x in zip("ecb", (e, c, b), strict=True)
            ]
            return tuple(forward_ad.unpack_dual(f(*inputs)))

    return transform


def _second_order(f: Loss, e: Tensor, c: Tensor, b: Tensor) -> Any:
    inputs = _with_grad(e, c, b)
    found = _grads(f(*inputs).sum(), inputs, create_graph=True)
    return _grads(sum(g.square().sum() for g in found if g is not None), inputs)


def _batched(f: Loss, e: Tensor, c: Tensor, b: Tensor) -> Any:
    inputs = _with_grad(e, c, b)
    total = f(*inputs).sum()
    return _grads(total, inputs, grad_outputs=torch.ones(3, *total.shape, dtype=total.dtype),
                  is_grads_batched=True)  # fmt: skip


def _frozen(names: str) -> Transform:
    def transform(f: Loss, e: Tensor, c: Tensor, b: Tensor) -> Any:
        inputs = _with_grad(e, c, b)
        kept = [x for name, x in zip("ecb", inputs, strict=True) if name not in names]
        for x in inputs:
            x.requires_grad_(any(x is y for y in kept))
        loss = f(*inputs)
        return loss.detach(), _grads(loss.sum(), kept) if loss.requires_grad else None

    return transform


def _with_hooks(f: Loss, e: Tensor, c: Tensor, b: Tensor) -> Any:
    inputs = _with_grad(e, c, b)
    features = inputs[0] * 2
    features.retain_grad()
    features.register_hook(lambda g: g * 3)
    with torch.autograd.graph.save_on_cpu():
        loss = f(features, *inputs[1:])
    loss.sum().backward()
    return features.grad, [x.grad for x in inputs]


def _within_a_graph(f: Loss, e: Tensor, c: Tensor, b: Tensor) -> Any:
    e, c = _with_grad(e, c)
    inner = grad(lambda x: f(x, c.detach(), b).sum())(e)
    return _grads(inner.sum() + f(e, c, b).sum(), [c])


TRANSFORMS: dict[str, Transform] = {
    "grad e": lambda f, e, c, b: grad(lambda *a: f(*a).sum())(e, c, b),
    "grad c b": lambda f, e, c, b: grad(lambda *a: f(*a).sum(), argnums=(1, 2))(e, c, b),
    "grad of a function of c alone": lambda f, e, c, b: grad(lambda c: f(e, c, b).sum())(c),
    "grad_and_value": lambda f, e, c, b: grad_and_value(lambda *a: f(*a).sum(), (0, 1, 2))(e, c, b),
    "vjp": lambda f, e, c, b: (
        lambda out, pull: pull(torch.ones_like(out))
    )(*vjp(f, e, c, b)),
    "jvp": lambda f, e, c, b: jvp(f, (e, c, b), (e.cos(), c.sin(), b.cos())),
    "jvp c": lambda f, e, c, b: jvp(lambda c: f(e, c, b), (c,), (c.sin(),)),
    "jvp b": lambda f, e, c, b: jvp(lambda b: f(e, c, b), (b,), (b.sin(),)),
    "jacrev c": lambda f, e, c, b: jacrev(f, argnums=1)(e, c, b),
    "jacfwd b": lambda f, e, c, b: jacfwd(f, argnums=2)(e, c, b),
    "hessian b": lambda f, e, c, b: hessian(lambda b: f(e, c, b).sum())(b),
    "grad of grad": lambda f, e, c, b: grad(
        lambda e: grad(lambda e: f(e, c, b).sum())(e).square().sum()
    )(e),
    "vmap over e": lambda f, e, c, b: vmap(f, in_dims=(0, None, None))(
        torch.stack([e, e * 2]), c, b
    ),
    "vmap over c": lambda f, e, c, b: vmap(f, in_dims=(None, 0, None))(
        e, torch.stack([c, c * 2, c + 1]), b
    ),
    "vmap over all": lambda f, e, c, b: vmap(f)(*(torch.stack([x, x * 2]) for x in (e, c, b))),
    "vmap of grad": lambda f, e, c, b: vmap(
        grad(lambda e, c, b: f(e, c, b).sum(), argnums=(0, 1)), in_dims=(0, None, None)
    )(torch.stack([e, e + 1]), c, b),
    "grad of vmap": lambda f, e, c, b: grad(
        lambda c: vmap(lambda e: f(e, c, b))(torch.stack([e, e + 1])).sum()
    )(c),
    "vmap over labels": lambda f, e, c, b: vmap(f, in_dims=(None, None, None, 0))(
        e, c, b, torch.stack([torch.arange(len(e)), torch.arange(len(e)).flip(0)])
    ),
    "vmap over the last dimension": lambda f, e, c, b: vmap(f, in_dims=(-1, None, None))(
        torch.stack([e, e * 2], -1), c, b
    ),
    "vmap of vmap": lambda f, e, c, b: vmap(vmap(f, (0, None, None)), (None, 0, None))(
        torch.stack([e, e * 2]), torch.stack([c, c + 1, c * 2]), b
    ),
    "vmap in chunks": lambda f, e, c, b: vmap(f, in_dims=(0, None, 0), chunk_size=1)(
        torch.stack([e, e * 2]), c, torch.stack([b, b * 2])
    ),
    "vmap of jvp": lambda f, e, c, b: vmap(
        lambda t: jvp(lambda c: f(e, c, b), (c,), (t,))[1]
    )(torch.stack([c, c.sin()])),
    "jvp of vmap": lambda f, e, c, b: jvp(
        lambda c: vmap(lambda e: f(e, c, b))(torch.stack([e, e + 1])), (c,), (c.sin(),)
    ),
    "vmap of vjp": lambda f, e, c, b: (
        lambda out, pull: vmap(pull)(torch.stack([torch.ones_like(out), 2 + out]))
    )(*vjp(f, e, c, b)),
    "jacfwd of e": lambda f, e, c, b: jacfwd(f)(e, c, b),
    "functionalize": lambda f, e, c, b: functionalize(lambda e: f(e * 2, c, b))(e),
    "grad under no_grad": lambda f, e, c, b: torch.no_grad()(grad(lambda c: f(e, c, b).sum()))(c),
    "grad with an outer graph": _within_a_graph,
    "dual e": _dual("e"),
    "dual c": _dual("c"),
    "dual all": _dual("ecb"),
    "backward twice": _twice,
    "checkpoint": _checkpointed(False),
    "reentrant checkpoint": _checkpointed(True),
    "second order": _second_order,
    "batched gradients": _batched,
    "frozen e": _frozen("e"),
    "frozen c": _frozen("c"),
    "frozen all but b": _frozen("ec"),
    "frozen all": _frozen("ecb"),
    "hooks": _with_hooks,
    "functional jvp": lambda f, e, c, b: torch.autograd.functional.jvp(
        f, (e, c, b), (e.cos(), c.cos(), b.cos())
    ),
    "functional vhp": lambda f, e, c, b: torch.autograd.functional.vhp(
        lambda b: f(e, c, b).sum(), b, b.cos()
    ),
    "functional jacobian": lambda f, e, c, b: torch.autograd.functional.jacobian(
        lambda b: f(e, c, b), b, vectorize=True
    ),
    "no_grad": lambda f, e, c, b: torch.no_grad()(f)(*_with_grad(e, c, b)),
    "inference_mode": lambda f, e, c, b: torch.inference_mode()(f)(*_with_grad(e, c, b)),
}  # fmt: skip


@dataclass
class Call:
    """A call under a transform."""

    transform: str
    lead: tuple[int, ...]
    classes: int
    dim: int
    options: dict[str, Any]
    has_bias: bool
    impl: str
    as_module: bool
    ignored: float

    def run(self, impl: str) -> Any:
        """Return the results of the transform with an implementation."""
        generator = torch.Generator().manual_seed(1)
        make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        e, c = make(*self.lead, self.dim), make(self.classes, self.dim)
        b = make(self.classes)
        targets = torch.randint(0, self.classes, self.lead, generator=generator)
        is_ignored = torch.rand(self.lead, generator=generator) < self.ignored
        targets[is_ignored] = self.options.get("ignore_index", -100)

        def f(e: Tensor, c: Tensor, b: Tensor, order: Tensor | None = None) -> Tensor:
            bias = b if self.has_bias else None
            labels = targets if order is None else targets[order]
            if self.as_module:
                module = LinearCrossEntropy(impl=impl, **self.options)
                result = functional_call(module, {}, (e, c, labels, bias))
            else:
                result = linear_cross_entropy(e, c, labels, bias, impl=impl, **self.options)
            if isinstance(result, tuple):
                return result[0].sum() + 0.3 * result[1].square().sum()
            return result

        torch.manual_seed(0)
        return TRANSFORMS[self.transform](f, e, c, b)


def draw(seed: int, index: int) -> Call:
    """The call that belongs to a seed and an index."""
    r = random.Random(f"{seed}/{index}")
    lead = r.choice([(1,), (4,), (2, 3), (1, 5), (2, 1), (2, 1, 3)])
    options: dict[str, Any] = {"reduction": r.choice(["mean", "mean", "sum", "none"])}
    if r.random() < 0.3:
        options["softcap"] = r.choice([1.5, 4.0])
    if r.random() < 0.3 and lead[-1] > 1:
        options["shift"] = r.choice([True, 1])
    if r.random() < 0.2:
        options["ignore_index"] = r.choice([-1, 0, 3])
    if r.random() < 0.25:
        options["return_lse"] = True
    return Call(
        r.choice([*TRANSFORMS]),
        lead,
        r.choice([3, 7, 19]),
        r.choice([1, 4]),
        options,
        r.random() < 0.6,
        r.choice(["auto", "chunked"]),
        r.random() < 0.2,
        r.choice([0.0, 0.0, 0.3, 1.0]),
    )


def judge(call: Call) -> tuple[str, str]:
    """Verdict and reason: equal, refused, invalid, or a fault: crash, different."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = call.run("reference")
        except Exception as error:
            return "invalid", _line(error)
        try:
            actual = call.run(call.impl)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            ours = last.filename.startswith(PACKAGE) and "reference" in str(error)
            return "refused" if ours else "crash", _line(error)
    wanted, got = tree_leaves(expected), tree_leaves(actual)
    if len(wanted) != len(got):
        return "different", f"{len(got)} results for {len(wanted)}"
    for position, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return "different", f"result {position}: {type(b).__name__} for {type(a).__name__}"
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad:
            return "different", f"result {position}: {tuple(b.shape)}, {b.dtype} for " + (
                f"{tuple(a.shape)}, {a.dtype}; requires_grad {b.requires_grad}, {a.requires_grad}"
            )
        scale = max(1.0, a.abs().max().item()) if a.numel() else 1.0
        if not torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
            return "different", f"result {position}: off by {(a - b).abs().max().item():.3g}"
    return "equal", ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


FAULTS = ("crash", "different")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="calls to run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--index", type=int, help="run and print this one alone")
    args = parser.parse_args()
    if args.index is not None:
        print(draw(args.seed, args.index), *judge(draw(args.seed, args.index)), sep="\n")
        return 0
    counts: Counter[str] = Counter()
    reasons: Counter[tuple[str, str, str]] = Counter()
    first: dict[tuple[str, str, str], int] = {}
    for index in range(args.count):
        call = draw(args.seed, index)
        verdict, reason = judge(call)
        counts[verdict] += 1
        if verdict != "equal":
            key = (verdict, call.transform, reason if verdict != "different" else "")
            reasons[key] += 1
            first.setdefault(key, index)
    print(f"seed {args.seed}, {args.count} calls: {dict(counts)}")
    for (verdict, transform, reason), count in sorted(reasons.items()):
        index = first[verdict, transform, reason]
        print(f"{verdict:10} {count:4}  {transform}: {reason[:140]} (index {index})")
    return any(counts[fault] for fault in FAULTS)


if __name__ == "__main__":
    sys.exit(main())
