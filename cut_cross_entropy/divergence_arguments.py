"""Arguments of divergences: checks of what two models must have in common, and their problems."""

import re
from typing import Any

import torch
from torch import Tensor

from cut_cross_entropy.arguments import Prepared, prepare, stand_in
from cut_cross_entropy.call_context import recordable
from cut_cross_entropy.distributed.options import VocabParallelOptions
from cut_cross_entropy.heads.head import Head
from cut_cross_entropy.problem import Problem
from cut_cross_entropy.validation import check_dense


def check_beta(beta: float) -> None:
    """Accept a number from 0 to 1.

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.SymFloat)):
        raise TypeError(f"beta must be a float, got {type(beta).__name__}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be a float from 0 to 1, got {beta!r}")


def check_models(
    e_student: Tensor,
    head_student: Tensor | Head,
    e_teacher: Tensor,
    head_teacher: Tensor | Head,
) -> None:
    """Check what the two models must have in common.

    Raises:
        TypeError: not a tensor.
        ValueError: different tokens, classes or devices.
    """
    named = {
        "e_student": e_student,
        "head_student": stand_in(head_student),
        "e_teacher": e_teacher,
        "head_teacher": stand_in(head_teacher),
    }
    for name, tensor in named.items():
        check_placed(name, tensor, "e_student", e_student)
        if tensor.ndim < 1:
            raise ValueError(f"{name} must have a last dimension of features, got a scalar")
    check_shape(
        "e_teacher", e_teacher.shape[:-1], "leading shape of e_student", e_student.shape[:-1]
    )
    num_classes, others = (named[f"head_{name}"].shape[0] for name in ("student", "teacher"))
    if others != num_classes:
        raise ValueError(
            f"head_teacher must have the classes of head_student, V = {num_classes}, "
            f"got {others}: pass the rows of the classes that both have"
        )


def check_placed(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that an argument is a dense tensor on the device of another.

    Raises:
        TypeError: not a tensor, or not a dense one.
        ValueError: different devices.
    """
    check_dense(name, tensor)
    if isinstance(other, Tensor) and tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def check_shape(name: str, got: torch.Size, of: str, expected: torch.Size) -> None:
    """Check a shape, or a part of it, which is ``of`` another argument.

    Raises:
        ValueError: it differs.
    """
    if got != expected:
        raise ValueError(f"{name} must have the {of}, {tuple(expected)}, got {tuple(got)}")


def marked_targets(
    e_student: Tensor, targets: Tensor | None, mask: Tensor | None, ignore_index: int
) -> Tensor:
    """Return the targets, or any class, of the tokens that count, ``ignore_index`` elsewhere.

    Raises:
        TypeError, ValueError: targets or a mask that do not fit.
    """
    shape = e_student.shape[:-1]
    for name, given in (("targets", targets), ("mask", mask)):
        if given is not None:
            check_placed(name, given, "e_student", e_student)
            check_shape(name, given.shape, "leading shape of e_student", shape)
    check_mask_dtype(mask)
    if targets is None:
        targets = torch.zeros(shape, dtype=torch.int64, device=e_student.device)  # any class
    return recordable(targets) if mask is None else torch.where(mask, targets, ignore_index)


def check_mask_dtype(mask: Tensor | None) -> None:
    """Accept a tensor of bools, or None.

    Raises:
        TypeError: another dtype.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"the dtype of mask must be torch.bool, got {mask.dtype}")


def prepare_model(
    role: str,
    e: Tensor,
    head: Tensor | Head,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float | Tensor,
    ignore_index: int,
    memory_budget: int,
    vocab_parallel_options: VocabParallelOptions | None,
) -> Prepared:
    """Return the problem of one of the models; errors name its arguments."""
    arguments = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "shift": 0,
        "memory_budget": memory_budget,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "vocab_parallel_options": vocab_parallel_options,
        "data_parallel_options": None,
    }
    if torch.compiler.is_compiling():
        return prepare(e, head, targets, bias, **arguments)  # type: ignore[arg-type]
    try:
        return prepare(e, head, targets, bias, **arguments)  # type: ignore[arg-type]
    except (TypeError, ValueError, NotImplementedError) as error:
        names = {"e": f"e_{role}", "c": f"head_{role}"}
        message = re.sub(r"\b[ec]\b", lambda found: names[found[0]], str(error))
        raise type(error)(f"{role}: {message}") from error


def frozen(value: Any) -> Any:
    """Return a tensor of the teacher without a gradient; anything else as it is."""
    return recordable(value.detach()) if isinstance(value, Tensor) else value


def check_shards(student: Problem, teacher: Problem, impl: str) -> None:
    """Check that a process holds the same classes of both heads.

    Raises:
        ValueError: it does not, or the implementation needs all.
    """
    held = [(x.group, x.first_class, x.c.shape[0]) for x in (student, teacher)]
    if held[0] != held[1]:
        names = [
            "all classes" if group is None else f"classes {first} to {first + count} of a group"
            for group, first, count in held
        ]
        raise ValueError(
            "head_teacher must be spread over the same processes as head_student, class by class: "
            f"this one holds {names[0]} of the student and {names[1]} of the teacher"
        )
    if student.group is not None and impl == "reference":
        raise ValueError(
            "impl='reference' of linear_divergence needs all classes: use 'auto', 'cce' or "
            "'chunked' where they are spread over processes"
        )
