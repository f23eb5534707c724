"""Adapters under tensor and sequence parallelism and FSDP, in two processes over gloo."""

import sys
import types

import pytest
import torch
import torch.distributed as dist
from liger_kernel import ops

from cut_cross_entropy import adapters
from tests.adapters import stand_ins
from tests.adapters.parity import DIM, assert_same, plain, problem, step
from tests.transformers.processes import WORLD, run_in_processes

TIME, BATCH = 6, 2


def tensors(rank):
    """Hidden states of all tokens and (T / R, B, D) of this rank's, its rows, and targets."""
    hidden, weight, targets = problem()
    own = hidden.view(TIME, BATCH, DIM).chunk(WORLD)[rank]
    return hidden, own, weight.chunk(WORLD)[rank], targets


def case_liger(rank):
    hidden, _, rows, targets = tensors(rank)
    with adapters.liger():
        function = ops.LigerFusedLinearScaledCrossEntropyTPFunction

        def call(h, w):
            nll, entropy = function.apply(h, w, targets, dist.group.WORLD, 0.7, -100, 1, True)
            return -nll, entropy

        return step(call, hidden, rows)


def case_verl(rank):
    hidden, _, rows, targets = tensors(rank)
    with stand_ins.verl(), adapters.verl():
        function = sys.modules["verl.models.mcore.model_forward_fused"].linear_cross_entropy
        return step(
            lambda h, w: function(h, w, targets, 0.7, "none", dist.group.WORLD), hidden, rows
        )


def case_nemo_rl(rank):
    _, own, rows, targets = tensors(rank)
    start = rank * len(rows)
    with stand_ins.nemo_rl(), adapters.nemo_rl():
        function = sys.modules[
            "nemo_rl.distributed.model_utils"
        ].ChunkedDistributedHiddenStatesToLogprobs
        call = lambda h, w: function.apply(
            h, targets.view(BATCH, TIME), w, start, start + len(rows), 4, dist.group.WORLD
        )
        return step(call, own, rows)


def megatron(hidden, rows, targets, sequence_parallel):
    def call(h, w):
        layer = types.SimpleNamespace(weight=w, bias=None, tp_group=dist.group.WORLD)
        result = adapters.megatron_output_processor(
            hidden_states=h,
            output_layer=layer,
            output_weight=None,
            labels=targets.view(BATCH, TIME),
            context=adapters.MegatronContext(temperature=0.7, outputs=("entropy",)),
            scale_logits=lambda logits: logits,
            config=types.SimpleNamespace(sequence_parallel=sequence_parallel),
        )
        return result.logprobs, result.entropy

    return step(call, hidden, rows)


def case_megatron(rank):
    hidden, _, rows, targets = tensors(rank)
    return megatron(hidden.view(TIME, BATCH, DIM), rows, targets, False)


def case_megatron_sequence_parallel(rank):
    _, own, rows, targets = tensors(rank)
    return megatron(own, rows, targets, True)


CASES = (case_liger, case_verl, case_nemo_rl, case_megatron, case_megatron_sequence_parallel)


class Decoder(torch.nn.Module):
    """A model as torchtitan has it, whose forward leaves the head out."""

    def __init__(self, weight):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(weight.shape[1]))
        self.lm_head = torch.nn.Linear(*reversed(weight.shape), bias=False)
        self.lm_head.weight.data.copy_(weight)

    def forward(self, hidden):
        return hidden * self.scale


def fsdp_of_torchtitan(rank):
    """Loss of the own tokens, and the gradient of the whole head, which FSDP averages."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    hidden, _, targets = problem(seed=rank)
    model = Decoder(problem()[1])
    head = fully_shard(model.lm_head)
    fully_shard(model)
    with stand_ins.torchtitan():
        cls = adapters.torchtitan()
        inner = sys.modules["torchtitan.components.loss"].CrossEntropyLoss
        loss = cls(cls.Config(loss_fn=inner.Config()))
        loss.set_lm_head(head)
        leaf = hidden.requires_grad_()
        states = model(leaf.view(BATCH, TIME, DIM))
        value, _ = loss(states, targets.view(BATCH, TIME), 12.0)
    is_sharded = isinstance(head.weight, DTensor)
    value.backward()
    return value.detach(), leaf.grad, head.weight.grad.full_tensor(), is_sharded


def all_cases(rank):
    return [*(case(rank) for case in CASES), fsdp_of_torchtitan(rank)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By rank and case."""
    return run_in_processes(all_cases, tmp_path_factory.mktemp("adapters"))


def expected(case):
    """Outputs and gradients of one process with the whole vocabulary."""
    hidden, weight, targets = problem()
    if case in (case_liger, case_verl):
        return step(lambda h, w: plain(h, w, targets, 0.7), hidden, weight)
    hidden, targets = hidden.view(TIME, BATCH, DIM), targets.view(BATCH, TIME)
    temperature = 1.0 if case is case_nemo_rl else 0.7
    call = lambda h, w: plain(h.transpose(0, 1), w, targets, temperature)
    if case is case_nemo_rl:
        return step(lambda h, w: call(h, w)[0], hidden, weight)
    return step(call, hidden, weight)


@pytest.mark.parametrize("case", CASES)
def test_every_process_has_all_results_and_its_part_of_the_gradients(results, case):
    outputs, (grad_hidden, grad_weight) = expected(case)
    own = [found[CASES.index(case)] for found in results]
    for rank, (own_outputs, (_, own_grad_weight)) in enumerate(own):
        rows = grad_weight.chunk(WORLD)[rank]
        assert_same((own_outputs, [own_grad_weight]), (outputs, [rows]))
    parts = [grads[0] for _, grads in own]
    if case is case_verl:  # parts, which verl's gathering of tokens sums in its backward
        assert_same(([sum(parts)],), ([grad_hidden],))
    elif case in (case_nemo_rl, case_megatron_sequence_parallel):  # of the own tokens
        assert_same(([torch.cat(parts)],), ([grad_hidden],))
    else:
        for part in parts:
            assert_same(([part],), ([grad_hidden],))


def test_torchtitan_under_fsdp(results):
    weight = problem()[1].requires_grad_()
    losses = []
    for rank in range(WORLD):
        hidden, _, targets = problem(seed=rank)
        leaf = hidden.requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf @ weight.T, targets)
        loss.backward()
        losses.append((loss.detach(), leaf.grad))
    for rank, (*_, (loss, grad_hidden, grad_weight, is_sharded)) in enumerate(results):
        assert is_sharded  # again, after the forward
        own = ([loss], [grad_hidden, grad_weight])
        assert_same(own, ([losses[rank][0]], [losses[rank][1], weight.grad / WORLD]))
