"""Every language model class of the installed transformers, patched against unpatched.

    python -m tests.transformers.sweep --output docs/transformers_sweep_5.md

Each class runs in a process of its own, in a tiny configuration on the CPU.
"""

import argparse
import copy
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cut_cross_entropy.lazy.sharded_heads import num_rows
from cut_cross_entropy.transformers import CutCrossEntropyWarning, call_count, cce_patch
from cut_cross_entropy.transformers.heads import find_heads
from tests.transformers.tiny import VOCAB, classes, model_class, tiny_inputs, tiny_model

LOSS_TOLERANCE = 2e-5  # relative; float32 with another order of summation
GRAD_TOLERANCE = 2e-4  # of the norm of the difference, relative to the norm


@dataclass
class Result:
    """Verdict on one class."""

    name: str
    model_type: str
    outcome: str  # equal, logits made, wrong, crash, not run
    detail: str = ""
    loss_error: float = 0.0
    grad_error: float = 0.0
    rows_before: int = 0
    rows_after: int = 0


class ClassWidth(TorchDispatchMode):
    """The most rows of a tensor that is as wide as the vocabulary, weights and copies aside."""

    def __init__(self, model: Module) -> None:
        super().__init__()
        self.weights = {tuple(sorted(p.shape)) for p in model.parameters()}
        for layer in model.modules():  # rows of a head and its adapter side by side
            for a in getattr(layer, "lora_A", {}).values():
                shape = (layer.out_features, layer.in_features + a.out_features)
                self.weights.add(tuple(sorted(shape)))
        self.widths = {VOCAB, *(rows for head in find_heads(model) if (rows := num_rows(head)))}
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and not tensor.is_meta  # without memory
                and tensor.is_floating_point()
                and tensor.ndim > 1
                and tuple(sorted(tensor.shape)) not in self.weights
            ):
                for width in self.widths.intersection(tensor.shape):
                    self.rows = max(self.rows, tensor.numel() // width)
        return result


def step(model: Module) -> tuple[float, dict[str, Any], int]:
    """Loss, gradients, and the rows of the largest class-width tensor."""
    model.zero_grad(set_to_none=True)
    base = getattr(model, "get_base_model", lambda: model)()  # within adapters
    inputs = tiny_inputs(base)
    torch.manual_seed(2)
    with ClassWidth(model) as widths:
        loss = model(**inputs)[0]
        if loss.ndim:
            raise ValueError(f"the first output is no loss: {tuple(loss.shape)}")
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return float(loss.detach()), grads, widths.rows


def with_adapter(model: Module, **options: Any) -> Module:
    """Return a model with an adapter of PEFT on its head.

    Args:
        model: one whose head is a linear layer.
        **options: of ``peft.LoraConfig``.
    """
    import peft

    heads = find_heads(model)
    names = {name for name, module in model.named_modules() if any(module is x for x in heads)}
    if not names or not all(isinstance(head, torch.nn.Linear) for head in heads):
        raise ValueError("no head is a linear layer")
    config = peft.LoraConfig(r=4, target_modules=names, **options)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 at first: the adapter would do nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def compare(name: str, model_type: str, change: Callable[[Module], Module] | None = None) -> Result:
    """Run one class and compare.

    Args:
        name: of the class.
        model_type: of its configuration.
        change: returns what becomes of the model before it is patched; None for itself.
    """
    result = Result(name, model_type, "not run")
    try:
        model = tiny_model(model_class(name), model_type)
        if change is not None:
            model = change(model)
        twin = copy.deepcopy(model)  # some models keep a state from step to step
        loss, grads, result.rows_before = step(model)
        if loss != loss or loss in (float("inf"), -float("inf")):
            raise ValueError(f"the loss is {loss}")
    except BaseException as error:
        result.detail = _describe(error)
        return result
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cce_patch(twin)
            patched_loss, patched_grads, result.rows_after = step(twin)
    except BaseException as error:
        result.outcome, result.detail = "crash", _describe(error)
        return result
    messages = [str(w.message) for w in caught if issubclass(w.category, CutCrossEntropyWarning)]
    result.loss_error = abs(patched_loss - loss) / max(abs(loss), 1e-6)
    result.grad_error, worst = gradient_error(grads, patched_grads)
    if not (result.loss_error <= LOSS_TOLERANCE and result.grad_error <= GRAD_TOLERANCE):
        result.outcome = "wrong"
        result.detail = f"loss {loss} and {patched_loss}; worst gradient {worst}"
    elif call_count(twin) and not messages and result.rows_after < result.rows_before:
        result.outcome = "equal"
    elif messages:
        result.outcome, result.detail = "logits made", "; ".join(messages)
    else:
        result.outcome, result.detail = "wrong", "logits were made without a word"
    return result


def gradient_error(grads: dict[str, Any], patched: dict[str, Any]) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and its name."""
    scale = max((float(g.norm()) for g in grads.values() if g is not None), default=0.0)
    worst, worst_name = 0.0, ""
    for name, expected in grads.items():
        got = patched[name]
        if expected is None and got is None:
            continue
        expected = torch.zeros_like(got) if expected is None else expected
        got = torch.zeros_like(expected) if got is None else got
        # A gradient that is rounding noise next to the others is compared with their scale.
        error = float((got - expected).norm()) / max(float(expected.norm()), 1e-4 * scale, 1e-12)
        if not error <= worst:
            worst, worst_name = error, name
    return worst, worst_name


def _describe(error: BaseException) -> str:
    if os.environ.get("SWEEP_TRACEBACK"):
        return "".join(traceback.format_exception(error))
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:200]


def in_process(name: str, model_type: str, timeout: float) -> Result:
    """:func:`compare` in a child process, so that a crash or a hang is one class's own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        with open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
            with os.fdopen(writer, "w") as pipe:
                json.dump(asdict(compare(name, model_type)), pipe)
        os._exit(0)
    os.close(writer)
    data, deadline = b"", time.monotonic() + timeout
    while time.monotonic() < deadline:
        ready, _, _ = select.select([reader], [], [], deadline - time.monotonic())
        chunk = os.read(reader, 65536) if ready else b""
        if not chunk:
            break
        data += chunk
    if time.monotonic() >= deadline:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if not data:
        return Result(name, model_type, "crash", f"the process ended with status {status}")
    return Result(**json.loads(data))


def table(results: list[Result]) -> str:
    """The results as a Markdown page."""
    counts = {o: sum(r.outcome == o for r in results) for o in OUTCOMES}
    ran = len(results) - counts["not run"]
    lines = [
        f"# Sweep over transformers {transformers.__version__}",
        "",
        "Every class of the causal language model and image-text-to-text mappings in a tiny",
        "configuration on the CPU in float32: loss and the gradient of every parameter, patched",
        "against unpatched. Made by `python -m tests.transformers.sweep`, "
        f"torch {torch.__version__.split('+')[0]}.",
        "",
        "| classes | run unpatched | equal, no logits made | right, but logits made | wrong "
        "| crash |",
        "|---|---|---|---|---|---|",
        f"| {len(results)} | {ran} | {counts['equal']} | {counts['logits made']} "
        f"| {counts['wrong']} | {counts['crash']} |",
        "",
        "*Rows* are those of the largest tensor as wide as the vocabulary that PyTorch made",
        "outside the operator, unpatched and patched; errors are relative.",
        "",
        "| class | type | outcome | loss error | gradient error | rows | remark |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(results, key=lambda r: (OUTCOMES.index(r.outcome), r.name)):
        detail = r.detail.replace("|", "\\|")
        if r.outcome in ("not run", "crash"):
            lines.append(f"| {r.name} | {r.model_type} | {r.outcome} | | | | {detail} |")
        else:
            lines.append(
                f"| {r.name} | {r.model_type} | {r.outcome} | {r.loss_error:.0e} "
                f"| {r.grad_error:.0e} | {r.rows_before}, {r.rows_after} | {detail} |"
            )
    return "\n".join(lines) + "\n"


OUTCOMES = ("equal", "logits made", "wrong", "crash", "not run")


def main() -> int:
    """Run the sweep; 1 if a class is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the table")
    parser.add_argument("--only", nargs="*", help="names of classes")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a class")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results = []
    for name, model_type in classes().items():
        if args.only and name not in args.only:
            continue
        result = in_process(name, model_type, args.timeout)
        results.append(result)
        print(f"{result.outcome:12} {name:50} {result.detail}", flush=True)
    counts = {o: sum(r.outcome == o for r in results) for o in OUTCOMES}
    print(len(results), counts)
    if args.output:
        args.output.write_text(table(results))
    return 1 if counts["wrong"] or counts["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
