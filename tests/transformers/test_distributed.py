"""Two processes over gloo: DDP and FSDP2."""

import pytest
import torch

from cut_cross_entropy.transformers import call_count, cce_patch, cce_unpatch, is_patched
from tests.transformers.models import assert_same_step, llama, loss_and_grads
from tests.transformers.processes import own_batch, reference, run_in_processes


def check(results, **changes):
    losses, grads = reference(**changes)
    for rank, (loss, rank_grads, count) in enumerate(results):
        assert_same_step((losses[0, rank], grads), (loss, rank_grads))
        assert count == 1


def ddp(rank, when):
    model = llama()
    if when == "before":
        cce_patch(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    if when == "after":
        cce_patch(wrapped)
    assert is_patched(wrapped)
    loss, grads = loss_and_grads(wrapped, **own_batch(rank))
    return loss, {n.removeprefix("module."): g for n, g in grads.items()}, call_count(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp(tmp_path, when):
    check(run_in_processes(ddp, tmp_path, when))


def fsdp2(rank, when, sharded_head, tied, reshard_root):
    from torch.distributed.fsdp import fully_shard

    model = llama(tie_word_embeddings=tied)
    if when == "before":
        cce_patch(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if sharded_head:
        fully_shard(model.lm_head)
    fully_shard(model, reshard_after_forward=reshard_root)
    if when == "after":
        cce_patch(model)
    assert is_patched(model)
    loss, grads = loss_and_grads(model, **own_batch(rank))
    grads = {name: grad.full_tensor() for name, grad in grads.items()}
    count = call_count(model)

    model.eval()  # the logits are there for one process alone, with the weights resharded
    with torch.no_grad():
        output = model(**own_batch(rank))
        if rank == 0:
            torch.testing.assert_close(output.loss, loss)
            assert output.logits.sum().isfinite()
            assert output.logits.shape[:2] == own_batch(rank)["labels"].shape
    model.train()
    cce_unpatch(model)
    assert not is_patched(model)
    assert model(**own_batch(rank)).logits is not None
    return loss, grads, count


FSDP2 = {
    "whole": ("before", False, False, True),
    "head by itself": ("after", True, False, True),
    "head by itself, patched before": ("before", True, False, None),
    "tied": ("after", False, True, None),
}


def fsdp2_cases(rank):
    scaled = fsdp2_with_a_scaled_head(rank)
    return {name: fsdp2(rank, *case) for name, case in FSDP2.items()}, scaled


@pytest.fixture(scope="module")
def fsdp2_results(tmp_path_factory):
    return run_in_processes(fsdp2_cases, tmp_path_factory.mktemp("fsdp2"))


@pytest.mark.parametrize("name", FSDP2)
def test_fsdp2(fsdp2_results, name):
    check([cases[name] for cases, _ in fsdp2_results], tie_word_embeddings=FSDP2[name][2])


def fsdp2_with_a_scaled_head(rank):
    import transformers
    from torch.distributed.fsdp import fully_shard

    from tests.transformers.models import SIZES

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SIZES | {"final_logit_softcapping": 3.0, "tie_word_embeddings": False}
    )
    model = transformers.Gemma2ForCausalLM(config).train()
    expected = loss_and_grads(model)
    fully_shard(model.lm_head)
    fully_shard(model)
    loss, grads = loss_and_grads(cce_patch(model))
    return expected, (loss, {name: g.full_tensor() for name, g in grads.items()}), call_count(model)


def test_fsdp2_with_a_softcap_after_a_sharded_head(fsdp2_results):
    for _, (expected, actual, count) in fsdp2_results:
        assert_same_step(expected, actual)
        assert count == 1
