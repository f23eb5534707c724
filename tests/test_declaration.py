"""Schemas, and the way from the values of an operator to objects and back."""

import dataclasses
from typing import NamedTuple

import pytest
import torch

from cut_cross_entropy import token_logprobs
from cut_cross_entropy.operators.declaration import Arguments, operator, schema
from cut_cross_entropy.outputs import Asked
from cut_cross_entropy.problem import Filter, Needed, Problem


class Kinds(NamedTuple):
    tensor: torch.Tensor
    maybe: torch.Tensor | None
    dtype: torch.dtype
    switch: bool
    number: float | None
    name: str | None


def test_schema_of_each_kind_of_field():
    assert schema(Kinds, "of_") == [
        "Tensor of_tensor",
        "Tensor? of_maybe",
        "ScalarType of_dtype",
        "bool of_switch",
        "float? of_number",
        "str? of_name",
    ]


@pytest.mark.parametrize("kind", [Problem, Filter, Needed, Asked])
def test_values_and_schema_are_in_the_order_of_the_fields(kind):
    names = [field.name for field in dataclasses.fields(kind)]
    assert [text.split()[1] for text in schema(kind)] == names
    values = tuple(object() for _ in names)
    made = kind(*values)
    assert made.flat() == values
    assert [getattr(made, name) for name in names] == list(values)


def test_arguments_are_unpacked_by_their_parts():
    arguments = Arguments("int first", Needed, ("filter_", Filter), "bool last")
    assert arguments.schema.startswith("int first, bool e, bool c, bool bias, float filter_toler")
    needed, filter_ = Needed(True, False, True), Filter(0.1, 0.2, True, False, 0.3, 0.6)
    flat = (7, *needed.flat(), *filter_.flat(), True)
    assert arguments.unpack(flat) == [7, needed, filter_, True]


def test_saved_inputs_come_back_in_their_places():
    class Context:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

        def set_materialize_grads(self, value):
            self.materialized = value

    arguments = Arguments("int first", "Tensor a", "Tensor? b", "float between", "Tensor? c")
    context, inputs, result = Context(), [1, torch.ones(1), None, 0.5, torch.ones(2)], torch.ones(3)
    arguments.save(context, inputs, [result])
    assert not any(isinstance(x, torch.Tensor) for x in context.inputs)
    found, (saved,) = arguments.saved(context)
    assert len(found) == len(inputs)
    assert all(x is y for x, y in zip(found, inputs, strict=True))
    assert saved is result


def test_autocast_is_off_in_a_body():
    class Result(NamedTuple):
        product: torch.Tensor

    @operator(
        "test_product", Arguments("Tensor a"), "Tensor", lambda a: a.new_empty(len(a), len(a))
    )
    def product(a):
        return a @ a.T

    a = torch.rand(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a.T).dtype == torch.bfloat16
        found = product(a)
    assert torch.equal(found, a @ a.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mean_logit_is_not_rounded_under_autocast(dtype):
    e, c = torch.randn(5, 16), torch.randn(40, 16)
    targets = torch.zeros(5, dtype=torch.long)
    with torch.autocast("cpu", dtype=dtype):
        found = token_logprobs(e, c, targets, outputs=["mean_logit"], impl="chunked").mean_logit
    exact = (e.to(dtype).double() @ c.to(dtype).double().T).mean(1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
