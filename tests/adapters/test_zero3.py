"""TRL's fused head under DeepSpeed ZeRO-3, on two processes over gloo on the CPU."""

import os

import pytest
import torch
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from trl.trainer.utils import add_fused_lm_head

from cut_cross_entropy import adapters
from tests.transformers.models import assert_same_step, llama
from tests.transformers.processes import WORLD, own_batch, reference, run_in_processes
from tests.transformers.test_zero3 import SETTINGS, Engine


def fused_step(rank, **changes):
    from deepspeed.utils import safe_get_full_grad

    model = llama(**changes)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    engine = Engine(model)
    with adapters.trl() as adapter:
        output = engine.engine(**own_batch(rank), fused_lm_head=True)
        kept = model.lm_head.weight.numel()
        engine.engine.backward(output.loss)
    grads = {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters()}
    engine.engine.step()
    return output.loss.detach(), grads, adapter.calls, kept


def zero3(rank):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(LOCAL_SIZE=str(WORLD), DS_ACCELERATOR="cpu")
    deepspeed.init_distributed("gloo", verbose=False)
    config = HfDeepSpeedConfig(SETTINGS)  # by which TRL knows that ZeRO-3 is on
    results = fused_step(rank), fused_step(rank, tie_word_embeddings=True)
    del config
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_in_processes(zero3, tmp_path_factory.mktemp("zero3"))


@pytest.mark.parametrize("tied", [False, True])
def test_the_step_of_a_partitioned_head_is_that_of_one_process(results, tied):
    losses, grads = reference(tie_word_embeddings=tied)
    for rank, cases in enumerate(results):
        loss, own_grads, calls, kept = cases[tied]
        assert_same_step((losses[0, rank], grads), (loss, own_grads))
        assert calls == 1
        assert kept == 0 or tied  # the parameter itself is partitioned after the forward
    assert torch.isfinite(losses).all()
