"""TRL's fused head on a GPU: its kernels and ours, in bfloat16, compared with float64."""

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from cut_cross_entropy import adapters
from tests.adapters.parity import plain, problem, step
from tests.transformers.models import batch, llama

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OUTPUTS = ("log_probs", "entropy", "is_top1")


def errors(found, exact):
    """Largest error of log-probabilities and entropies; relative ones of the gradients."""
    values = [float((x - y).abs().max()) for x, y in zip(found[0][:2], exact[0], strict=True)]
    grads = [float((x - y).norm() / y.norm()) for x, y in zip(found[1], exact[1], strict=True)]
    return values, grads


@pytest.mark.parametrize("impl", ["auto", "chunked"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_closer_to_the_truth_than_those_of_trl(impl, temperature):
    hidden, weight, targets = problem(tokens=300, classes=4099, dim=128, dtype=torch.bfloat16)
    hidden, weight, targets = (x.to(DEVICE) for x in (hidden, weight, targets))
    options = (None, targets, temperature, 1024, None, 1.0, OUTPUTS)
    call = lambda function: lambda h, w: function.apply(h, w, *options)[:2]
    exact = step(lambda h, w: plain(h, w, targets, temperature), hidden.double(), weight.double())
    theirs = step(call(ChunkedLogProbFunction), hidden, weight)
    with adapters.trl(impl=impl) as adapter:
        ours = step(call(trl_utils._ChunkedLogProbFunction), hidden, weight)
    assert adapter.calls == 1
    our_values, our_grads = errors(ours, exact)
    their_values, their_grads = errors(theirs, exact)
    for mine, other in zip(our_values, their_values, strict=True):
        assert mine <= 0.1 * other  # logits that are not rounded
        assert mine < 1e-4
    for mine, other in zip(our_grads, their_grads, strict=True):
        assert mine <= 1.5 * other + 1e-3


def test_a_step_of_a_model_that_scores_only_valid_tokens():
    data = {name: tensor.to(DEVICE) for name, tensor in batch(size=4, time=97).items()}
    results = []
    for active in (False, True):
        model = llama(vocab_size=4099, hidden_size=128, head_dim=32).to(DEVICE)
        add_fused_lm_head(model, temperature=0.9, outputs=OUTPUTS)
        adapter = adapters.trl() if active else None
        try:
            output = model(**data, fused_lm_head=True)
        finally:
            if adapter is not None:
                adapter.remove()
        output.loss.backward()
        results.append((output, [p.grad for p in model.parameters()]))
    assert adapter.calls == 1
    (theirs, their_grads), (ours, our_grads) = results
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert ours.log_probs[0, :3].count_nonzero() == 0  # without labels
    for mine, other in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-4)
