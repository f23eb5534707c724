"""Refusals of ``linear_divergence``, by message: the argument, what it got and what it takes."""

import math
import re

import pytest
import torch

from cut_cross_entropy import linear_divergence
from cut_cross_entropy.heads import Head
from tests.test_divergence import problem

FLOATS = "torch.float32, torch.bfloat16, torch.float16, torch.float64"
IMPLS = "impl of linear_divergence must be one of auto, cce, chunked, reference, got"
TOKENS = torch.Size([13])

BAD = {
    "beta above 1": ({"beta": 1.5}, "beta must be a float from 0 to 1, got 1.5"),
    "beta a bool": ({"beta": True}, "beta must be a float, got bool"),
    "beta NaN": ({"beta": math.nan}, "beta must be a float from 0 to 1, got nan"),
    "beta a tensor": ({"beta": torch.tensor(0.5)}, "beta must be a float, got Tensor"),
    "impl without divergences": ({"impl": "torch_compile"}, f"{IMPLS} 'torch_compile'"),
    "impl misspelt": ({"impl": "CCE"}, f"{IMPLS} 'CCE'. Did you mean 'cce'?"),
    "temperature 0": ({"temperature": 0.0}, "temperature must be a finite float > 0, got 0.0"),
    "temperature NaN": (
        {"temperature": torch.full(TOKENS, math.nan)},
        "temperature must have finite values > 0, got nan to nan",
    ),
    "temperature that trains": (
        {"temperature": torch.ones((), requires_grad=True)},
        "temperature has no gradient here: pass temperature.detach()",
    ),
    "temperature too long": (
        {"temperature": torch.ones(4)},
        "temperature must broadcast against targets, (13,), got shape (4,)",
    ),
    "softcap below 0": (
        {"student_softcap": -1.0},
        "student: softcap must be None or a finite float > 0, got -1.0",
    ),
    "scale 0": (
        {"teacher_logit_scale": 0.0},
        "teacher: logit_scale must be a finite float other than 0, got 0.0",
    ),
    "budget 0": ({"memory_budget": 0}, "memory_budget must be at least 1 byte, got 0"),
    "filter": ({"filter_eps": "x"}, 'filter_eps must be None, "auto", "high" or a float'),
    "ignored class no int": ({"ignore_index": "a"}, "ignore_index must be an int, got str"),
    "reduction misspelt": (
        {"reduction": "Mean"},
        "reduction must be one of mean, sum, none, got 'Mean'. Did you mean 'mean'?",
    ),
    "reduction None": ({"reduction": None}, "reduction must be a string, got NoneType"),
    "divisor without a mean": (
        {"num_items_in_batch": 4},
        "num_items_in_batch is the divisor of reduction='mean', got reduction='none'",
    ),
    "divisor 0": (
        {"reduction": "mean", "num_items_in_batch": 0},
        "num_items_in_batch must be > 0, got 0",
    ),
    "weights too long": (
        {"token_weights": torch.ones(12)},
        "token_weights must broadcast against targets, (13,), got shape (12,)",
    ),
    "weights of integers": (
        {"token_weights": torch.ones(13).long()},
        "the dtype of token_weights must be a floating point one, got torch.int64",
    ),
    "mask of floats": (
        {"mask": torch.ones(13)},
        "the dtype of mask must be torch.bool, got torch.float32",
    ),
    "mask too short": (
        {"mask": torch.ones(2, dtype=torch.bool)},
        "mask must have the leading shape of e_student, (13,), got (2,)",
    ),
    "targets too short": (
        {"targets": torch.zeros(12).long()},
        "targets must have the leading shape of e_student, (13,), got (12,)",
    ),
    "targets of floats": (
        {"targets": torch.zeros(13)},
        "the dtype of targets must be one of torch.int64, torch.int32, got torch.float32",
    ),
    "other tokens": (
        {"e_teacher": torch.zeros(12, 12)},
        "e_teacher must have the leading shape of e_student, (13,), got (12,)",
    ),
    "other classes": (
        {"head_teacher": torch.zeros(30, 12)},
        "head_teacher must have the classes of head_student, V = 300, got 30: pass the rows",
    ),
    "other device": (
        {"head_teacher": torch.zeros(300, 12, device="meta")},
        "head_teacher must be on the device of e_student, cpu, got meta",
    ),
    "other device of a Head": (
        {"head_teacher": Head(torch.zeros(300, 12, device="meta"))},
        "head_teacher must be on the device of e_student, cpu, got meta",
    ),
    "other features": (
        {"head_teacher": torch.zeros(300, 11)},
        "teacher: e_teacher and head_teacher must agree in their last dimension, got (13, 12) and "
        "(300, 11)",
    ),
    "other dtypes": (
        {"e_student": torch.zeros(13, 8).bfloat16()},
        "student: e_student and head_student must have the same dtype outside autocast, got "
        "torch.bfloat16 and torch.float64",
    ),
    "embeddings of integers": (
        {"e_student": torch.zeros(13, 8).long()},
        f"student: the dtype of e_student must be one of {FLOATS}, got torch.int64",
    ),
    "embeddings of one number": (
        {"e_student": torch.zeros(())},
        "e_student must have a last dimension of features, got a scalar",
    ),
    "nested embeddings": (
        {"e_teacher": torch.nested.nested_tensor([torch.zeros(13, 12)], layout=torch.jagged)},
        "e_teacher must be a dense tensor, got a nested tensor",
    ),
    "sparse head": (
        {"head_student": torch.zeros(300, 8).to_sparse()},
        "head_student must be a dense tensor, got layout torch.sparse_coo: call to_dense() first",
    ),
    "no head": (
        {"head_teacher": None},
        "head_teacher must be a torch.Tensor, got NoneType",
    ),
    "module for a head": (
        {"head_teacher": torch.nn.Linear(12, 300)},
        "head_teacher must be a torch.Tensor, got Linear: pass its .weight",
    ),
    "no class": (
        {"head_student": torch.zeros(0, 8), "head_teacher": torch.zeros(0, 12)},
        "student: head_student must have at least one row and one column, got (0, 8)",
    ),
    "bias too short": (
        {"teacher_bias": torch.zeros(3)},
        "teacher: bias must have shape (V,) = (300,), got (3,)",
    ),
    "bias no tensor": ({"teacher_bias": True}, "teacher: bias must be a torch.Tensor, got bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    changes, message = BAD[name]
    tensors, _ = problem()
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        linear_divergence(**{**tensors, **changes})


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_target_out_of_range(impl, reduction):
    tensors, targets = problem()
    targets[1] = 300
    with pytest.raises(ValueError, match=r"targets must lie in \[0, V\) with V = 300"):
        linear_divergence(**tensors, targets=targets, impl=impl, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivative(reduction):
    tensors, _ = problem()
    e = tensors["e_student"].requires_grad_()
    found = linear_divergence(**tensors, reduction=reduction).divergence.sum()
    (grad,) = torch.autograd.grad(found, e, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"has no second.*impl='reference' has"):
        grad.sum().backward()
