"""Tensor-parallel heads on two processes over gloo: the loss is vocabulary-parallel."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from cut_cross_entropy.transformers import call_count, cce_patch
from tests.transformers.models import VOCAB, assert_same_step, batch, llama, loss_and_grads
from tests.transformers.processes import WORLD, run_in_processes


def whole(grads):
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


def parallel_head(model, mesh=None, **layouts):
    """The model with its head's classes divided over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = mesh or init_device_mesh("cpu", (WORLD,))
    style = ColwiseParallel(**({"output_layouts": Replicate()} | layouts))
    parallelize_module(model.lm_head, mesh, style)
    return model


def step(model, **inputs):
    loss, grads = loss_and_grads(model, **inputs)
    return loss, whole(grads), call_count(model)


def widest(model):
    """Run the step; return it and the most columns of a matrix with a row per token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Columns(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor) or result.is_meta:  # the latter has no memory
                return result
            if result.ndim > 1 and result.shape[-1] > 60:
                Columns.largest = max(Columns.largest, result.shape[-1])
            return result

    with Columns():
        return step(model), Columns.largest


def case_even(rank):
    return step(cce_patch(parallel_head(llama(vocab_size=132))))


def case_ragged(rank):
    return step(parallel_head(cce_patch(llama())))


def case_sharded_too(rank):
    """FSDP2 over one dimension of the mesh, the head divided over the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "tp"))
    model = parallel_head(llama(vocab_size=132), mesh["tp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return step(cce_patch(fully_shard(model, mesh=mesh["dp"])))


EXACT = {
    "even": (case_even, {"vocab_size": 132}),
    "ragged": (case_ragged, {}),
    "sharded too": (case_sharded_too, {"vocab_size": 132}),
}


def loud(rank):
    """Losses, gradients and warnings where more than the usual loss is asked of the head."""

    def z_loss(logits, labels, **kwargs):
        flat = logits[:, :-1].reshape(-1, VOCAB + 1), labels[:, 1:].reshape(-1)
        return F.cross_entropy(*flat) + 0.1 * logits.logsumexp(-1).square().mean()

    def of_some_classes(logits, labels, **kwargs):
        return F.cross_entropy(logits[..., :130].reshape(-1, 130), labels.reshape(-1) % 130)

    results = []
    for loss in (z_loss, of_some_classes):
        model = llama(vocab_size=132)
        model.loss_function = loss
        expected = loss_and_grads(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = step(cce_patch(parallel_head(model)))
        results.append((expected, actual[:2], [str(w.message) for w in caught]))
    return results


def evaluation(rank):
    model = llama(vocab_size=132).eval()
    expected = model(**batch())
    output = cce_patch(parallel_head(model))(**batch())
    return (expected.loss, expected.logits), (output.loss, output.logits), call_count(model)


def by_transformers(rank, folder):
    """The tensor parallelism of transformers itself, with its own plan for the model."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").train()
    trained = step(cce_patch(model))
    model.eval()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model(**batch())
    return trained, (output.loss, output.logits), [str(w.message) for w in caught]


def tensor_parallel(rank, folder):
    results = {name: case(rank) for name, (case, _) in EXACT.items()}
    model = parallel_head(llama(vocab_size=132))
    memory = widest(model), widest(cce_patch(model))
    return results, memory, loud(rank), evaluation(rank), by_transformers(rank, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    llama(vocab_size=132).save_pretrained(folder / "model")
    return run_in_processes(tensor_parallel, folder, str(folder / "model"))


@pytest.mark.parametrize("name", EXACT)
def test_tensor_parallel_head(results, name):
    expected = loss_and_grads(llama(**EXACT[name][1]))
    for cases, *_ in results:
        loss, grads, count = cases[name]
        assert_same_step(expected, (loss, grads))
        assert count == 1


def test_no_logits_are_made_or_sent(results):
    for _, ((_, plain), ((_, _, count), patched)), *_ in results:
        assert count == 1
        assert plain == 132
        assert patched < 132 // WORLD  # what the operator makes inside is not seen


def test_what_needs_the_logits_is_right_and_loud(results):
    for _, _, cases, *_ in results:
        for expected, actual, messages in cases:
            assert_same_step(expected, actual)
            assert any("in full because of" in message for message in messages), messages


def test_evaluation_has_logits(results):
    for *_, (expected, actual, count), _ in results:
        torch.testing.assert_close(actual, expected)
        assert count == 1


def test_tensor_parallelism_of_transformers(results):
    model = llama(vocab_size=132)
    expected, evaluated = loss_and_grads(model), model.eval()(**batch())
    for *_, ((loss, grads, count), output, messages) in results:
        assert_same_step(expected, (loss, grads))
        assert count == 1
        torch.testing.assert_close(output, (evaluated.loss, evaluated.logits))
        assert any("multiplied its part of the classes" in text for text in messages), messages
