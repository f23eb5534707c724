"""Random programs between a head and its loss, on a model and its patched twin.

``python -m tests.transformers.chains --count 5000 --seed 1`` prints what came of them; ``--index``
runs a single one and prints it.
"""

import argparse
import copy
import dataclasses
import re
import sys
import traceback
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import einops
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

import cut_cross_entropy
from cut_cross_entropy.transformers import CutCrossEntropyWarning, cce_patch, is_patched
from tests.transformers import chain_model
from tests.transformers.chain_model import make_pair
from tests.transformers.chain_programs import Program, draw

PACKAGE = str(Path(cut_cross_entropy.__file__).parent)
REMEDIES = ("cce_unpatch", 'impl="reference"', "impl='reference'")

NAMESPACE = {
    **{name: value for name, value in vars(chain_model).items() if not name.startswith("_")},
    "CausalLMOutput": CausalLMOutput,
    "F": F,
    "OrderedDict": OrderedDict,
    "SimpleNamespace": SimpleNamespace,
    "checkpoint": checkpoint,
    "copy": copy,
    "defaultdict": defaultdict,
    "einops": einops,
    "is_patched": is_patched,
    "nn": nn,
    "np": np,
    "pack_padded_sequence": nn.utils.rnn.pack_padded_sequence,
    "rearrange": rearrange,
    "torch": torch,
    "tree_map": torch.utils._pytree.tree_map,
    "weakref": weakref,
}
"""The names that programs may use."""

FAULTS = ("different", "crash", "silent", "unclear")
"""Verdicts that are faults; the others are "equal", "fallback", "refused" and "invalid"."""


@dataclass
class Outcome:
    """Results of one step of one model."""

    leaves: list[tuple[str, Any]]
    loss: Tensor
    grads: dict[str, Tensor | None]
    seen: list[Any]


@dataclass
class Verdict:
    """Verdict on the patched model; ``reason`` says what differs."""

    kind: str
    reason: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind in FAULTS


class _FullProducts(TorchDispatchMode):
    """Counts products of any tensor with the weight of a head."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and isinstance(result, Tensor) and result.ndim:
            name = func.overloadpacket.__name__
            pointer = self.weight.untyped_storage().data_ptr()
            if name in ("mm", "addmm", "bmm", "matmul", "linear", "baddbmm") and any(
                isinstance(arg, Tensor)
                and not isinstance(arg, torch._subclasses.FakeTensor)
                and arg.untyped_storage().data_ptr() == pointer
                for arg in args
            ):
                self.count += result.shape[-1] == self.weight.shape[0]
        return result


def inputs(settings: dict[str, Any]) -> dict[str, Any]:
    """Ids and labels of a call, always the same."""
    random = torch.Generator().manual_seed(3)
    shape = (settings["batch"], settings["time"])
    ids = torch.randint(0, settings["classes"], shape, generator=random)
    labels = torch.randint(0, settings["classes"], shape, generator=random)
    if settings["labels"] == "none":
        labels.fill_(-100)
    elif settings["labels"] != "all":
        labels[torch.rand(shape, generator=random) < 0.3] = -100
    if settings["labels"] == "int32":
        labels = labels.int()
    items = (labels != -100).sum().clamp_min(1)
    items = {"tensor": items, "int": int(items), "float": float(items)}[settings["items"]]
    return {"input_ids": ids, "labels": labels, "num_items_in_batch": items}


def step(model: Any, program: Program) -> Outcome:
    """One call of the model and one backward, in the way that the program's settings ask for."""
    settings = program.settings
    model.seen, model.kept = [], None
    torch.manual_seed(5)
    with ExitStack() as stack:
        if settings["grad"] != "on":
            off = torch.no_grad if settings["grad"] == "off" else torch.inference_mode
            stack.enter_context(off())
        if settings["autocast"]:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        outputs = [model(**inputs(settings)) for _ in range(settings["calls"])]
    output = outputs[-1]
    leaves = list(flatten(output))
    loss = next((value for path, value in leaves if path in LOSSES), None)
    assert isinstance(loss, Tensor), f"no loss in {output!r}"
    for earlier in outputs[:-1]:
        loss = loss + next(value for path, value in flatten(earlier) if path in LOSSES)
    parameters = dict(model.named_parameters())
    grads: dict[str, Tensor | None] = dict.fromkeys(parameters)
    if loss.requires_grad:
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        total = loss
        how = settings["backward"]
        if how == "logits" and not model.training:  # a loss of the caller's own
            for path, value in leaves:
                if path == program.logits_at and isinstance(value, Tensor) and value.requires_grad:
                    total = total + 0.1 * value.square().mean()
        if how in ("grad", "higher"):
            found = torch.autograd.grad(
                total, list(trained.values()), allow_unused=True, create_graph=how == "higher"
            )
            if how == "higher":
                sum(f.square().sum() for f in found if f is not None).backward()
            else:
                grads |= dict(zip(trained, found, strict=True))
        else:
            total.backward(retain_graph=how in ("retain", "twice"))
            if how == "twice":
                total.backward()
        if how != "grad":
            grads = {
                name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()
            }
    seen = [*model.seen]
    if isinstance(model.kept, Tensor):
        seen.append(("requires_grad", model.kept.requires_grad))
        if model.kept.requires_grad:
            seen.append(model.kept.grad)
    return Outcome(leaves, loss.detach(), grads, seen)


LOSSES = ("", "[0]", ".loss", "['loss']", "[0].loss")
"""Its place in the outputs of programs."""


def flatten(output: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of any container, with the types of the containers."""
    if isinstance(output, (Tensor, str)) or output is None:
        yield path, output
        return
    items: list[tuple[str, Any]] | None = None
    if isinstance(output, CausalLMOutput | chain_model.OwnOutput) or dataclasses.is_dataclass(
        output
    ):
        items = [(f".{f.name}", getattr(output, f.name)) for f in dataclasses.fields(output)]
    elif isinstance(output, SimpleNamespace):
        items = [(f".{name}", value) for name, value in vars(output).items()]
    elif isinstance(output, Mapping):
        items = [(f"[{key!r}]", value) for key, value in output.items()]
    elif hasattr(output, "_fields"):
        items = [(f".{name}", getattr(output, name)) for name in output._fields]
    elif isinstance(output, (tuple, list)) and not isinstance(output, torch.Size):
        items = [(f"[{position}]", value) for position, value in enumerate(output)]
    if items is None:
        yield path, output
        return
    yield f"{path} type", type(output)
    for name, value in items:
        yield from flatten(value, path + name)


def judge(program: Program, look_for_products: bool = True) -> Verdict:
    """Run a program on a model and on its patched twin."""
    scope: dict[str, Any] = {}
    try:
        exec(compile(program.source(), "<program>", "exec"), NAMESPACE, scope)
    except SyntaxError as error:  # of a program that was made smaller
        return Verdict("invalid", _line(error))
    model, twin = make_pair(program.settings, scope["forward"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            expected = step(model, program)
        except Exception as error:
            return Verdict("invalid", _line(error))
        finally:
            torch.set_grad_enabled(True)
    spare = copy.deepcopy(twin) if look_for_products else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            actual = step(cce_patch(twin), program)
        except Exception as error:
            return _of_error(error)
        finally:
            torch.set_grad_enabled(True)
    warned = [
        _anonymous(str(w.message)) for w in caught if issubclass(w.category, CutCrossEntropyWarning)
    ]
    difference = differ(expected, actual, program)
    if difference:
        return Verdict("different", difference + (f"; warned: {warned}" if warned else ""))
    if warned:
        return Verdict("fallback", warned[0].split(": ", 1)[-1])
    weight = getattr(spare.lm_head, "weight", None) if spare is not None else None
    if weight is not None:
        products = _FullProducts(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with products:
                    step(cce_patch(spare), program)
            except Exception as error:
                return Verdict("equal", f"not looked for products: {_line(error)}")
        # Not what the program multiplies by itself, and not what its caller asks of the logits.
        own = "lm_head.weight" in program.head or program.settings["backward"] == "logits"
        if products.count and not own:
            return Verdict("silent", "full logits without a warning")
    return Verdict("equal")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {_anonymous(lines[0])}"


def _anonymous(message: str) -> str:
    """A message that is the same for all models."""
    return re.sub(r"Chain\d+ForCausalLM", "The model", message)


def _of_error(error: Exception) -> Verdict:
    """Whether an error is one that the package raises itself and that tells what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    ours = last.filename.startswith(PACKAGE)
    name = Path(last.filename).name
    at = name if name == "<program>" else f"{name}:{last.lineno}"
    nearest = next((f for f in reversed(frames) if f.filename.startswith(PACKAGE)), None)
    via = f" via {Path(nearest.filename).name}:{nearest.lineno} {nearest.name}" if nearest else ""
    if not (isinstance(error, RuntimeError) and ours):
        return Verdict("crash", f"{_line(error)} ({at}{via})")
    if not any(remedy in str(error) for remedy in REMEDIES):
        return Verdict("unclear", f"{_line(error)} ({at})")
    return Verdict("refused", _line(error).split(": ", 1)[-1])


def differ(expected: Outcome, actual: Outcome, program: Program) -> str:
    """The first difference between two outcomes, or ""."""
    tolerance = program.tolerance
    wanted, got = dict(expected.leaves), dict(actual.leaves)
    for path, value in wanted.items():
        may_be_none = program.settings["training"] and path.startswith(program.logits_at)
        if path not in got:
            if may_be_none:
                continue
            return f"output{path} is missing"
        if got[path] is None and value is not None and may_be_none:
            continue
        if reason := _unequal(value, got[path], tolerance):
            return f"output{path}: {reason}"
    if extra := [path for path in got if path not in wanted]:
        return f"output{extra[0]} is new: {type(got[extra[0]]).__name__}"
    scale = max([1.0, *(g.abs().max().item() for g in expected.grads.values() if g is not None)])
    if not scale < float("inf"):
        return ""  # a mean over no labels: NaN there, 0 here
    for name, grad in expected.grads.items():
        if reason := _unequal(grad, actual.grads[name], tolerance, scale):
            return f"gradient of {name}: {reason}"
    if len(expected.seen) != len(actual.seen):
        return f"hooks saw {len(actual.seen)} gradients for {len(expected.seen)}"
    for position, (one, other) in enumerate(zip(expected.seen, actual.seen, strict=True)):
        if reason := _unequal(one, other, tolerance, scale):
            return f"hook {position}: {reason}"
    return ""


def _unequal(wanted: Any, got: Any, tolerance: float, scale: float = 1.0) -> str:
    if isinstance(wanted, Tensor) != isinstance(got, Tensor):
        return f"{_short(got)} for {_short(wanted)}"
    if isinstance(wanted, (tuple, list)) and isinstance(got, (tuple, list)):
        if len(wanted) != len(got):
            return f"{got!r} for {wanted!r}"
        reasons = (_unequal(a, b, tolerance, scale) for a, b in zip(wanted, got, strict=True))
        return next((reason for reason in reasons if reason), "")
    if isinstance(wanted, (float, np.floating)) and isinstance(got, (float, np.floating)):
        wanted, got = torch.tensor(float(wanted)), torch.tensor(float(got))
    if not isinstance(wanted, Tensor):
        return "" if wanted == got else f"{_short(got)} for {_short(wanted)}"
    if wanted.shape != got.shape:
        return f"shape {tuple(got.shape)} for {tuple(wanted.shape)}"
    if wanted.requires_grad != got.requires_grad:
        return f"requires_grad is {got.requires_grad} for {wanted.requires_grad}"
    if wanted.dtype != got.dtype:
        return f"{got.dtype} for {wanted.dtype}"
    a, b = wanted.detach().double(), got.detach().double()
    finite = a.isfinite()
    if wanted.dtype in (torch.int64, torch.bool) and not torch.equal(wanted, got):
        return f"{_short(got)} for {_short(wanted)}"
    a, b = a[finite], b[finite]
    if not a.numel():
        return ""
    scale = max(scale, a.abs().max().item())
    error = (a - b).abs().max().item()
    if error <= tolerance * scale:
        return ""
    worst = int((a - b).abs().argmax())
    return f"{b[worst].item():.10g} for {a[worst].item():.10g}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__}{tuple(value.shape)}"
    return repr(value)[:80]


def minimise(program: Program, verdict: Verdict) -> tuple[Program, Verdict]:
    """The program with all statements taken away that the fault does not need."""
    key = _key(verdict)
    again = True
    while again:
        again = False
        for candidate in _smaller(program):
            found = judge(candidate)
            if _key(found) == key:
                program, verdict, again = candidate, found, True
                break
    return program, verdict


def _smaller(program: Program) -> Iterator[Program]:
    for position in range(len(program.statements)):
        yield program.without(position)
    simple = {
        "frozen": (),
        "tied": False,
        "training": True,
        "labels": "all",
        "grad": "on",
        "autocast": False,
        "backward": "plain",
        "items": "int",
        "calls": 1,
        "head": "linear",
        "dtype": torch.float64,
    }
    for name, value in simple.items():
        if program.settings[name] != value:
            yield dataclasses.replace(program, settings=program.settings | {name: value})
    for simpler in ("x = self.lm_head(h)",):
        if program.head != simpler:
            yield dataclasses.replace(program, head=simpler)
    if program.output != "return loss, x, logs":
        yield dataclasses.replace(program, output="return loss, x, logs")
    for position, statement in enumerate(program.statements):
        for line in range(statement.count("\n") + 1):
            lines = statement.split("\n")
            del lines[line]
            if lines:
                shorter = [*program.statements]
                shorter[position] = "\n".join(lines)
                yield dataclasses.replace(program, statements=shorter)


def _key(verdict: Verdict) -> tuple[str, str]:
    """Return a key that two occurrences of one fault share."""
    reason = re.sub(r"[-\d.e]*\d+", "#", verdict.reason.split("; warned")[0])
    if verdict.kind != "different":
        return verdict.kind, reason
    where, _, what = reason.partition(": ")
    if where.startswith("gradient"):
        return verdict.kind, "gradient None" if "None" in what else "gradient"
    where = next((name for name in ("loss", "logs", "logits") if name in where), where)
    return verdict.kind, f"{where}: {re.sub('#.*', '#', what)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=300, help="programs to run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="index of the first one")
    parser.add_argument("--index", type=int, help="run and print this one alone")
    parser.add_argument("--faults", type=int, default=40, help="minimise and print so many")
    args = parser.parse_args()
    if args.index is not None:
        program = draw(args.seed, args.index)
        verdict = judge(program)
        print(f"{program}{verdict.kind}: {verdict.reason}")
        if verdict.is_fault:
            program, verdict = minimise(program, verdict)
            print(f"\nsmaller:\n{program}{verdict.kind}: {verdict.reason}")
        return verdict.is_fault
    counts: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    faults: dict[tuple[str, str], list[tuple[Program, Verdict]]] = defaultdict(list)
    for index in range(args.start, args.start + args.count):
        program = draw(args.seed, index)
        verdict = judge(program)
        counts[verdict.kind] += 1
        reasons[verdict.kind][verdict.reason] += 1
        if verdict.is_fault:
            faults[_key(verdict)].append((program, verdict))
    print(f"seed {args.seed}, {args.count} programs from {args.start}: {dict(counts)}")
    for kind, tally in reasons.items():
        print(f"\n{kind}: {counts[kind]}")
        for reason, count in tally.most_common(25):
            print(f"  {count:5d}  {reason[:200]}")
    by_count = sorted(faults.values(), key=len, reverse=True)
    for found in by_count[: args.faults]:
        program, verdict = minimise(*min(found, key=lambda item: len(item[0].source())))
        print(f"\n{len(found)} times, {verdict.kind}: {verdict.reason}\n{program}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
