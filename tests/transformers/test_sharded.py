"""FSDP2 and FSDP1 on two processes over gloo, beyond the basics in ``test_distributed``.

All cases of a kind run in one pair of processes, since starting them takes longer than the cases.
"""

import gc
import warnings
from functools import partial

import pytest
import torch

from cut_cross_entropy.transformers import call_count, cce_patch, is_patched
from tests.distributed.processes import settled
from tests.transformers.models import SIZES, VOCAB, assert_same_step, llama
from tests.transformers.processes import WORLD, own_batch, reference, run_in_processes

HIDDEN = SIZES["hidden_size"]


def shard(model, head="alone", reshard=True, **options):
    """The model under FSDP2, its head in a group of its own, with the norm, or in the root."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head == "alone":
        fully_shard(model.lm_head, **options)
    elif head == "with the norm":  # what transformers does for a model with an fsdp_plan
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    return fully_shard(model, reshard_after_forward=reshard, **options)


def whole(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def run_steps(model, rank, steps=1, sync=None):
    """Losses and gradients of some steps without an optimizer between them."""
    losses = []
    for step in range(steps):
        if sync is not None:
            sync(step == steps - 1)
        loss = model(**own_batch(rank, step)).loss
        loss.backward()
        losses.append(loss.detach())
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses), grads, call_count(getattr(model, "module", model))


def case_in_the_root(rank):
    return run_steps(shard(cce_patch(llama()), head="root"), rank)


def case_with_the_norm(rank):
    return run_steps(cce_patch(shard(llama(), head="with the norm")), rank)


def case_tied(rank):
    model = shard(cce_patch(llama(tie_word_embeddings=True)), head="root")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return run_steps(model, rank)


def case_accumulated_without_sync(rank):
    model = shard(cce_patch(llama()))
    return run_steps(model, rank, 3, model.set_requires_gradient_sync)


def case_accumulated_without_sync_in_the_root(rank):
    model = shard(cce_patch(llama()), head="root")
    return run_steps(model, rank, 2, model.set_requires_gradient_sync)


def case_checkpointed(rank):
    model = cce_patch(shard(llama()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return run_steps(model, rank)


def case_offloaded(rank):
    from torch.distributed.fsdp import CPUOffloadPolicy

    return run_steps(
        cce_patch(shard(llama(), offload_policy=CPUOffloadPolicy(pin_memory=False))), rank
    )


def case_replicated_and_sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp_replicate", "dp_shard"))
    return run_steps(cce_patch(shard(llama(), mesh=mesh)), rank)


EXACT = {
    "in the root": (case_in_the_root, {}),
    "with the norm": (case_with_the_norm, {}),
    "tied": (case_tied, {"tie_word_embeddings": True}),
    "accumulated without sync": (case_accumulated_without_sync, {"steps": 3}),
    "accumulated in the root": (case_accumulated_without_sync_in_the_root, {"steps": 2}),
    "checkpointed": (case_checkpointed, {}),
    "offloaded": (case_offloaded, {}),
    "replicated and sharded": (case_replicated_and_sharded, {}),
}


def fsdp2(rank):
    gathers = gathers_and_memory(rank)
    results = {name: case(rank) for name, (case, _) in EXACT.items()}
    return results, mixed_precision(rank), gathers, lora(rank), hooked(rank)


def mixed_precision(rank):
    """Losses and gradients in bfloat16, patched and not, with the head alone and in the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for head in ("alone", "root"):
        for patch in (lambda model: model, cce_patch):
            results.append(run_steps(patch(shard(llama(), head=head, mp_policy=policy)), rank))
    return results


def gathers_and_memory(rank):
    """Gathers of a step with and without the patch, and where the whole classifier lives."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    gather, count = group.foreach_all_gather, []

    def counted(*args, **kwargs):
        count.append(1)
        return gather(*args, **kwargs)

    group.foreach_all_gather = counted
    gathers, live, live_while_gathered = [], [], []
    # A mean would compute the gradient of the classifier in the forward, and keep that.
    for patch in (lambda model: model, lambda model: cce_patch(model, reduction="none")):
        model = patch(shard(llama()))
        count.clear()
        loss = model(**own_batch(rank)).loss.sum()
        live.append(settled(live_classifiers))
        forward = len(count)
        loss.backward()
        gathers.append((forward, len(count)))
        del loss
        model.zero_grad()
        model.lm_head.unshard()
        live_while_gathered.append(live_classifiers())
    group.foreach_all_gather = gather
    return gathers, live + live_while_gathered


def live_classifiers():
    """Tensors with memory for a whole classifier of floats."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some attributes of the objects are deprecated
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum(
        x.numel() >= VOCAB * HIDDEN and x.untyped_storage().nbytes() >= 4 * VOCAB * HIDDEN
        for x in tensors
    )


def lora(rank):
    """LoRA on a head that is sharded by itself."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(llama(), config)
    plain = [model(**own_batch(other)).loss for other in range(WORLD)]
    torch.stack(plain).mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    base = shard(model.get_base_model())
    cce_patch(model)
    losses, got, _ = run_steps(model, rank)
    return (plain[rank].detach(), grads), (losses[0], got), call_count(base)


def hooked(rank):
    """A head that is sharded by itself and whose output somebody looks at."""
    model, shapes = cce_patch(shard(llama())), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses, grads, count = run_steps(model, rank)
    return losses, grads, count, shapes, [str(w.message) for w in caught]


@pytest.fixture(scope="module")
def fsdp2_results(tmp_path_factory):
    return run_in_processes(fsdp2, tmp_path_factory.mktemp("fsdp2"))


@pytest.mark.parametrize("name", EXACT)
def test_fsdp2(fsdp2_results, name):
    losses, grads = reference(**EXACT[name][1])
    for rank, (results, *_) in enumerate(fsdp2_results):
        got, got_grads, count = results[name]
        assert_same_step((losses[:, rank], grads), (got, got_grads))
        assert count == len(losses)


def test_fsdp2_mixed_precision_is_as_exact_as_without_the_patch(fsdp2_results):
    exact_losses, exact = reference()
    for rank, (_, results, *_) in enumerate(fsdp2_results):
        for plain, patched in (results[:2], results[2:]):
            assert patched[2] == 1
            assert patched[0].dtype == plain[0].dtype
            error = abs(patched[0] - exact_losses[:, rank])
            assert error <= 1.5 * abs(plain[0] - exact_losses[:, rank]) + 2e-3
            for name, grad in exact.items():
                assert patched[1][name].dtype == plain[1][name].dtype
                errors = [float((r[1][name] - grad).norm() / grad.norm()) for r in (plain, patched)]
                assert errors[1] <= 1.5 * errors[0] + 1e-3, (name, errors)


def test_fsdp2_gathers_no_more_and_keeps_no_more(fsdp2_results):
    for _, _, (gathers, live), *_ in fsdp2_results:
        assert gathers[0][0] > 0
        assert gathers[1] == gathers[0]
        assert min(live[2:]) > 0, "a gathered classifier has to be seen"
        assert live[1] == 0 <= live[0]


def test_fsdp2_with_lora_on_a_head_by_itself(fsdp2_results):
    for *_, (expected, actual, count), _ in fsdp2_results:
        assert_same_step(expected, actual)
        assert count == 1


def test_fsdp2_with_a_hook_on_a_head_by_itself_says_so(fsdp2_results):
    losses, grads = reference()
    for rank, (*_, (got, got_grads, count, shapes, messages)) in enumerate(fsdp2_results):
        assert_same_step((losses[:, rank], grads), (got, got_grads))
        assert count == 0
        assert shapes == [(2, 11, VOCAB)]
        assert any("has forward hooks (tests)" in message for message in messages), messages


def fsdp1(rank):
    """The whole model, or its layers and head by themselves; flattened parameters or not."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    results = {}
    for keep in (True, False):
        for alone in (True, False):
            model = llama()
            parts = {*model.model.layers, *([model.lm_head] if alone else [])}
            policy = partial(lambda_auto_wrap_policy, lambda_fn=parts.__contains__)
            cpu = torch.device("cpu")
            wrapped = FullyShardedDataParallel(
                model, auto_wrap_policy=policy, use_orig_params=keep, device_id=cpu
            )
            cce_patch(wrapped)
            assert is_patched(wrapped)
            loss = wrapped(**own_batch(rank)).loss
            loss.backward()
            with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=keep):
                grads = {
                    name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                    for name, p in wrapped.named_parameters()
                    if keep
                }
            norm = wrapped.clip_grad_norm_(1e9)
            results[keep, alone] = (loss.detach(), grads, norm, call_count(model))
    return results


def test_fsdp1(tmp_path):
    losses, grads = reference()
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    for rank, results in enumerate(run_in_processes(fsdp1, tmp_path)):
        for (keep, _), (loss, got, got_norm, count) in results.items():
            torch.testing.assert_close(loss, losses[0, rank])
            torch.testing.assert_close(got_norm, norm, rtol=1e-4, atol=1e-6)
            assert count == 1
            if keep:
                assert_same_step((loss, grads), (loss, got))
