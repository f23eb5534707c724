"""Methods to measure: this package's implementations, PyTorch's own, and other packages.

A method is built inside a process of its own, so nothing here imports a package before it is
asked for. ``build`` gets a problem and gives a function without arguments that computes its mean
loss. Apple's releases import under the same name as this package; a path to one goes first on
``sys.path`` of that process.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import token_methods as tokens
from .data import Problem
from .questions import Builder

if TYPE_CHECKING:  # the name may be somebody else's package
    from cut_cross_entropy.options import ImplName

Loss = Callable[[], Tensor]
GIB = 2**30


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Args:
        build: makes the loss of a problem.
        logprobs, divergence: make the results for each token of a question; None if there are none.
        package: what has to be importable; None for PyTorch itself.
        cpu: whether it runs without a GPU.
        softcap: whether it can cap logits.
        peer: whether it is somebody else's package.
        variant: whether it is another one with other options: measured only if it is named.
        title: what the tables call it.
    """

    build: Callable[[Problem], Loss]
    logprobs: Builder | None = None
    divergence: Builder | None = None
    package: str | None = "cut_cross_entropy"
    cpu: bool = False
    softcap: bool = True
    peer: bool = False
    variant: bool = False
    title: str = ""

    def has(self, subject: str) -> bool:
        """Whether it has kinds of this subject: ``"loss"``, ``"logprobs"`` or ``"divergence"``."""
        return subject == "loss" or getattr(self, subject) is not None


def _ours(impl: "ImplName", **options: Any) -> Callable[[Problem], Loss]:
    def build(problem: Problem) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        return lambda: linear_cross_entropy(
            problem.e, problem.c, problem.targets, softcap=problem.softcap, impl=impl, **options
        )

    return build


def _baseline(problem: Problem) -> Loss:
    return lambda: F.cross_entropy(problem.logits(problem.e, problem.c), problem.targets)


def _gemm(problem: Problem) -> Loss:
    """Not a loss: the library's ``e @ c.T``, by parts that fit the memory.

    Of an odd V the last few classes are left out: with them the library takes several times as
    long, aligned rows or not, and everything measured in its products would look the better for it.
    """
    e, c = problem.e.detach(), problem.c.detach()
    count = c.shape[0] // 8 * 8 or c.shape[0]
    part = min(count, max(8192, 2**29 // e.shape[0]))
    out = torch.empty((e.shape[0], -(-part // 64) * 64), dtype=e.dtype, device=e.device)

    def run() -> Tensor:
        for rows in c[:count].split(part):
            torch.mm(e, rows.T, out=out[:, : rows.shape[0]])
        return out

    return run


def _apple(problem: Problem) -> Loss:
    package = importlib.import_module("cut_cross_entropy")
    if hasattr(package, "record_filter"):
        raise ImportError("apple needs --peer apple=PATH, a folder that holds Apple's package")
    return lambda: package.linear_cross_entropy(
        problem.e, problem.c, problem.targets, softcap=problem.softcap, impl="cce"
    )


def _liger(problem: Problem) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(softcap=problem.softcap)
    return lambda: module(problem.c, problem.e, problem.targets)


def _quack(problem: Problem) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as loss

    # 0.6.5 tells vectors of rows and columns by their lengths, and refuses a chunk of as many
    # tokens as features. Llama 3 8B took 39.5 ms with 8,192 tokens in a chunk, 41.0 with 2,048.
    chunk = 4096 if problem.e.shape[1] != 4096 else 8192
    return lambda: loss(problem.e, problem.c, problem.targets, chunk_size=chunk, tuned=False)


def _torch(problem: Problem) -> Loss:
    function: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise ImportError(f"PyTorch {torch.__version__} has no linear_cross_entropy")
    return lambda: function(
        problem.e, problem.c, problem.targets, options=options(allow_retain_graph=True)
    )


METHODS = {
    "gemm": Method(_gemm, None, None, None, cpu=True, title="one product `e @ c.T`"),
    "cce": Method(_ours("cce"), tokens.ours("cce"), tokens.our_divergence("cce"), title="`cce`"),
    "cce_exact": Method(_ours("cce_exact"), tokens.ours("cce_exact"), title="`cce_exact`"),
    "cce_exact_1gib": Method(
        _ours("cce_exact", memory_budget=GIB), variant=True, title="`cce_exact`, 1 GiB"
    ),
    "cce_exact_c": Method(
        _ours("cce", filter_c_grad=False, memory_budget=GIB), variant=True,
        title="`cce`, dC exact, 1 GiB",
    ),
    "cce_exact_e": Method(
        _ours("cce", filter_e_grad=False, memory_budget=GIB), variant=True,
        title="`cce`, dE exact, 1 GiB",
    ),
    "torch_compile": Method(_ours("torch_compile"), cpu=True, title="`torch_compile`"),
    "chunked": Method(
        _ours("chunked"), tokens.ours("chunked"), tokens.our_divergence("chunked"), cpu=True,
        title="`chunked`",
    ),
    "chunked_1gib": Method(
        _ours("chunked", memory_budget=GIB), cpu=True, variant=True, title="`chunked`, 1 GiB"
    ),
    "baseline": Method(
        _baseline, tokens.full_logits, tokens.full_logits_divergence, None, cpu=True,
        title="full logits, eager",
    ),
    "apple": Method(_apple, peer=True, title="Apple's `cce`"),
    "liger": Method(
        _liger, tokens.liger, tokens.liger_divergence, "liger_kernel", peer=True, title="Liger"
    ),
    "quack": Method(_quack, None, None, "quack", softcap=False, peer=True, title="quack"),
    "trl": Method(
        tokens.mean_nll(tokens.trl), tokens.trl, tokens.trl_divergence, "trl", cpu=True, peer=True,
        title="TRL, chunked",
    ),
    "verl": Method(
        tokens.mean_nll(tokens.verl), tokens.verl, None, "verl", softcap=False, peer=True,
        title="verl",
    ),
    "torch": Method(
        _torch, None, None, None, cpu=True, softcap=False, title="`F.linear_cross_entropy`"
    ),
}  # fmt: skip

DEFAULT = [name for name, method in METHODS.items() if not method.variant]
"""What is measured if no method is named."""


def installed(name: str, peers: dict[str, str]) -> bool:
    """Whether the method is worth starting a process for; what fails there is reported."""
    method = METHODS[name]
    if name in peers:
        return True
    if name == "torch":
        return hasattr(torch.nn, "LinearCrossEntropyOptions")
    if name == "apple":
        return False  # the name is this package's own
    return method.package is None or importlib.util.find_spec(method.package) is not None


def version_of(name: str) -> str:
    """Version of the package behind a method, in the process that imported it."""
    method = METHODS[name]
    if method.package is None:
        return torch.__version__
    module = sys.modules.get(method.package)
    found = getattr(module, "__version__", None)
    if isinstance(found, str):
        return found
    # A folder of unpacked wheels carries the version in the name of its metadata.
    from importlib.metadata import distributions, packages_distributions

    names = packages_distributions().get(method.package, [])
    for folder in getattr(module, "__path__", []):
        root = folder.rsplit("/", 1)[0]
        for distribution in distributions(path=[root]):
            if distribution.metadata["Name"] in names:
                return distribution.version
    return "unknown"
