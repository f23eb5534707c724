"""Two processes over gloo: DDP and FSDP2."""

import multiprocessing
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cut_cross_entropy.transformers import call_count, cce_patch, cce_unpatch, is_patched
from tests.transformers.models import assert_same_step, batch, llama, loss_and_grads

WORLD = 2


def run_in_processes(case, tmp_path, *args):
    """``case(rank, *args)`` in two processes with a process group; its results by rank."""
    # The server imports once; what it forks has run no backward pass, which a fork cannot follow.
    multiprocessing.set_forkserver_preload(["torch", "tests.transformers.models"])
    arguments = (case, str(tmp_path), args)
    mp.start_processes(_process, arguments, nprocs=WORLD, start_method="forkserver")
    return [pickle.loads((tmp_path / f"result{rank}").read_bytes()) for rank in range(WORLD)]


def _process(rank, case, folder, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    warnings.filterwarnings("error", message=".*(patch|logits).*")
    result = case(rank, *args)
    with open(f"{folder}/result{rank}", "wb") as file:
        pickle.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()


def own_batch(rank):
    return batch(seed=10 + rank)


def mean_of_both():
    """What both processes have to arrive at: the mean of their losses' gradients."""
    model = llama()
    losses = torch.stack([model(**own_batch(rank)).loss for rank in range(WORLD)])
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def check(results):
    losses, grads = mean_of_both()
    for rank, (loss, rank_grads, count) in enumerate(results):
        assert_same_step((losses[rank], grads), (loss, rank_grads))
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


@pytest.mark.parametrize(
    ("when", "sharded_head", "tied", "reshard_root"),
    [
        ("before", False, False, True),
        ("after", True, False, True),
        ("before", True, False, None),
        ("after", False, True, None),
    ],
    ids=["whole", "head-by-itself", "head-by-itself-before", "tied"],
)
def test_fsdp2(tmp_path, when, sharded_head, tied, reshard_root):
    results = run_in_processes(fsdp2, tmp_path, when, sharded_head, tied, reshard_root)
    if tied:
        for loss, grads, count in results:
            assert count == 1
            assert loss.isfinite()
            assert "lm_head.weight" not in grads
        torch.testing.assert_close(results[0][1], results[1][1])
        return
    check(results)


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


def test_fsdp2_with_a_softcap_after_a_sharded_head(tmp_path):
    for expected, actual, count in run_in_processes(fsdp2_with_a_scaled_head, tmp_path):
        assert_same_step(expected, actual)
        assert count == 1


def tensor_parallel(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = llama(vocab_size=132)
    expected = loss_and_grads(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
    cce_patch(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss, grads = loss_and_grads(model)
    full = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return expected, (loss, full), [str(w.message) for w in caught]


def test_a_tensor_parallel_head_keeps_its_logits_and_says_so(tmp_path):
    for expected, actual, messages in run_in_processes(tensor_parallel, tmp_path):
        assert_same_step(expected, actual)
        assert any("tensor-parallel" in message for message in messages), messages
