"""DeepSpeed ZeRO-3 on two processes over gloo on the CPU."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from cut_cross_entropy.transformers import call_count, cce_patch
from tests.transformers.models import assert_same_step, llama
from tests.transformers.processes import WORLD, own_batch, reference, run_in_processes

SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


class Engine:
    """A model under ZeRO-3."""

    def __init__(self, model, settings=None, **more):
        import deepspeed

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.model = model
        self.engine, *_ = deepspeed.initialize(
            model=model, config=(settings or SETTINGS) | more, optimizer=optimizer
        )

    def steps(self, rank, steps=1):
        """Losses, gradients and the count of losses without logits."""
        from deepspeed.utils import safe_get_full_grad

        losses = []
        for step in range(steps):
            loss = self.engine(**own_batch(rank, step)).loss
            self.engine.backward(loss)
            losses.append(loss.detach().clone())
        grads = {n: safe_get_full_grad(p).clone() for n, p in self.model.named_parameters()}
        self.engine.step()
        return torch.stack(losses), grads, call_count(self.model)


def zero3(rank):
    # A kernel that gloo does without; DeepSpeed would compile it first.
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # As many processes as belong to this host, for DeepSpeed, which is told by its launcher.
    os.environ.update(LOCAL_SIZE=str(WORLD), DS_ACCELERATOR="cpu")
    deepspeed.init_distributed("gloo", verbose=False)
    results = {name: case(rank) for name, (case, _) in EXACT.items()}
    return results, gathers(rank), evaluation(rank), lora(rank), bfloat16(rank)


def case_patched_before(rank):
    return Engine(cce_patch(llama())).steps(rank)


def case_patched_after(rank):
    engine = Engine(llama())
    assert cce_patch(engine.engine) is engine.engine
    result = engine.steps(rank)
    assert engine.model.lm_head.weight.numel() == 0  # partitioned again
    return result


def case_tied(rank):
    return Engine(cce_patch(llama(tie_word_embeddings=True))).steps(rank)


def case_accumulated(rank):
    return Engine(cce_patch(llama()), gradient_accumulation_steps=3).steps(rank, 3)


def case_checkpointed(rank):
    model = cce_patch(llama())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return Engine(model).steps(rank)


def case_initialised_in_parts(rank):
    import deepspeed

    weights = llama().state_dict()
    with deepspeed.zero.Init(config_dict_or_path=SETTINGS):
        model = llama(pad_token_id=None)  # whose row transformers would zero in a part of it
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(weights[name])
    return Engine(cce_patch(model)).steps(rank)


def case_provided_configuration(rank):
    """The configuration of the training script; a trainer fills in what it leaves to one."""
    provided = json.loads((Path(__file__).parents[2] / "training" / "zero3.json").read_text())
    settings = without_auto(provided) | {"train_micro_batch_size_per_gpu": 2}
    assert settings["zero_optimization"]["stage"] == 3
    settings["zero_allow_untested_optimizer"] = True
    return Engine(cce_patch(llama()), settings).steps(rank)


def without_auto(settings):
    kept = {key: value for key, value in settings.items() if value != "auto"}
    return {k: without_auto(v) if isinstance(v, dict) else v for k, v in kept.items()}


EXACT = {
    "patched before": (case_patched_before, {}),
    "patched after": (case_patched_after, {}),
    "tied": (case_tied, {"tie_word_embeddings": True}),
    "accumulated": (case_accumulated, {"steps": 3}),
    "checkpointed": (case_checkpointed, {}),
    "provided configuration": (case_provided_configuration, {}),
    "initialised in parts": (case_initialised_in_parts, {}),
}


def gathers(rank):
    """Count the gathers of a parameter in a forward and a step, with and without the patch."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    fetch, fetched = Coordinator._PartitionedParameterCoordinator__all_gather_params_, []

    def counted(self, params, *args, **kwargs):
        fetched.extend(params)
        return fetch(self, params, *args, **kwargs)

    Coordinator._PartitionedParameterCoordinator__all_gather_params_ = counted
    counts = []
    for patch in (lambda model: model, cce_patch):
        engine = Engine(patch(llama()))
        fetched.clear()
        loss = engine.engine(**own_batch(rank)).loss
        forward, whole = len(fetched), engine.model.lm_head.weight.numel()
        engine.engine.backward(loss)
        engine.engine.step()
        counts.append((forward, len(fetched), whole))
    Coordinator._PartitionedParameterCoordinator__all_gather_params_ = fetch
    return counts


def evaluation(rank):
    engine = Engine(cce_patch(llama()))
    engine.engine.eval()
    with torch.no_grad():
        output = engine.engine(**own_batch(rank))
    return output.loss, output.logits


def lora(rank):
    """LoRA on the head: its parts are partitioned by themselves."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(llama(), config)
    expected = model(**own_batch(rank)).loss.detach()
    engine = Engine(cce_patch(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = engine.engine(**own_batch(rank)).loss
    return expected, loss.detach(), [str(w.message) for w in caught]


def bfloat16(rank):
    """Losses and gradients, patched and not."""
    return [
        Engine(patch(llama()), bf16={"enabled": True}).steps(rank)
        for patch in (lambda model: model, cce_patch)
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_in_processes(zero3, tmp_path_factory.mktemp("zero3"))


@pytest.mark.parametrize("name", EXACT)
def test_zero3(results, name):
    losses, grads = reference(mean_of_steps=True, **EXACT[name][1])
    for rank, (cases, *_) in enumerate(results):
        got, got_grads, count = cases[name]
        assert_same_step((losses[:, rank], grads), (got, got_grads))
        assert count == len(losses)


def test_zero3_gathers_no_more_and_keeps_no_more(results):
    for _, (plain, patched), *_ in results:
        assert plain[0] > 0
        assert patched == plain
        assert patched[2] == 0


def test_zero3_evaluation_has_logits(results):
    for rank, (_, _, (loss, logits), *_) in enumerate(results):
        expected = llama()(**own_batch(rank))
        torch.testing.assert_close(loss, expected.loss)
        torch.testing.assert_close(logits, expected.logits)


def test_zero3_with_lora_on_the_head_keeps_its_logits_and_says_so(results):
    for *_, (expected, loss, messages), _ in results:
        torch.testing.assert_close(loss, expected)
        assert any("partitions by themselves" in message for message in messages), messages


def test_zero3_in_bfloat16_is_as_exact_as_without_the_patch(results):
    losses, grads = reference()
    for rank, (*_, (plain, patched)) in enumerate(results):
        assert patched[2] == 1
        error = abs(patched[0].float() - losses[:, rank])
        assert error <= 1.5 * abs(plain[0].float() - losses[:, rank]) + 2e-3
        for name, grad in grads.items():
            errors = [float((r[1][name] - grad).norm() / grad.norm()) for r in (plain, patched)]
            assert errors[1] <= 1.5 * errors[0] + 1e-3, (name, errors)
