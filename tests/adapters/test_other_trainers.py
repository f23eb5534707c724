"""Adapters for trainers that are not installed, against stand-ins with the same signatures."""

import sys
import types

import pytest
import torch
from torch import nn

from cut_cross_entropy import adapters
from tests.adapters import stand_ins
from tests.adapters.parity import (
    CLASSES,
    DIM,
    assert_same,
    of_axolotl_options,
    plain,
    problem,
    step,
    topk_problem,
)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 4)])
def test_verl(shape):
    hidden, weight, targets = problem()
    hidden, targets = hidden.view(*shape, DIM), targets.view(shape)
    with stand_ins.verl():
        kernel = sys.modules["verl.utils.kernel.linear_cross_entropy"]
        megatron = sys.modules["verl.models.mcore.model_forward_fused"]
        with adapters.verl() as adapter:
            function = kernel.linear_cross_entropy
            assert megatron.linear_cross_entropy is function
            ours = step(lambda h, w: function(h, w, targets, 0.7, "none"), hidden, weight)
            with pytest.raises(NotImplementedError, match="reduction must be 'none', got 'mean'"):
                function(hidden, weight, targets, 0.7, "mean")
        assert adapter.calls == 1
        with pytest.raises(RuntimeError, match="needs a GPU"):
            megatron.linear_cross_entropy(hidden, weight, targets)
    theirs = step(lambda h, w: plain(h.flatten(0, -2), w, targets.flatten(), 0.7), hidden, weight)
    assert_same(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prime_rl(softcap):
    """With the gradient of the entropy, which prime-rl's functions do not have."""
    hidden, weight, targets = problem()
    inverse = torch.linspace(0.5, 2.0, len(targets))
    options = (targets, inverse, 4) + (() if softcap is None else (softcap,))
    with stand_ins.prime_rl(), adapters.prime_rl() as adapter:
        layers = "prime_rl.trainer.models.layers."
        if softcap is None:
            function = sys.modules[layers + "lm_head"]._SequenceChunkedLogProbEntropyFn
        else:
            function = sys.modules[layers + "lm_head_gemma"]._GemmaChunkedLogProbEntropyFn
        ours = step(lambda h, w: function.apply(h, w, *options), hidden, weight)
    assert adapter.calls == 1
    theirs = step(lambda h, w: plain(h, w, targets, 1 / inverse, softcap), hidden, weight)
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", ["no mask", "mask", "mask with logprobs"])
def test_prime_rl_with_a_sampling_mask(case):
    hidden, weight, targets = problem()
    inverse = torch.linspace(0.5, 2.0, len(targets))
    mask = torch.arange(4 * len(targets)).view(-1, 4).int()  # most rows lack their target
    mask[::2, 1] = targets[::2].int()
    mask[:, 3] = -1
    mask[3] = -1
    options = (targets, inverse, 4, None if case == "no mask" else mask, case.endswith("logprobs"))
    with stand_ins.prime_rl(stand_ins.SequenceChunkedWithMask):
        module = sys.modules["prime_rl.trainer.models.layers.lm_head"]

        def call(h, w):
            found = module._SequenceChunkedLogProbEntropyFn.apply(h, w, *options)
            assert len(found) == 3
            logprobs, entropy, of_masks = found
            results = (logprobs, entropy.detach(), of_masks)
            return tuple(x for x in results if x is not None)

        theirs = step(call, hidden, weight)
        with adapters.prime_rl() as adapter:
            ours = step(call, hidden, weight)
    assert adapter.calls == 1
    assert len(ours[0]) == 2 + case.endswith("logprobs")
    assert_same(ours, theirs)


@pytest.mark.parametrize("normalised", [False, True])
@of_axolotl_options
def test_axolotl(normalised, beta, temperature, hard, soft, bias):
    student, (ids, logprobs, mask, labels) = topk_problem(bias)
    options = (hard, soft, -100, temperature, beta, False, 4, hard > 0, normalised)
    with stand_ins.axolotl():
        module = sys.modules["axolotl.integrations.kd.kernels.liger"]

        def call(hidden, weight, bias=None):
            function = module.LigerFusedLinearKLTopKLogprobFunction
            return function.apply(hidden, weight, ids, logprobs, mask, labels, bias, *options)

        theirs = step(call, *student)
        with adapters.axolotl() as adapter:
            ours = step(call, *student)
        assert adapter.calls == 1
        assert module.LigerFusedLinearKLTopKLogprobFunction is stand_ins.TopKLogprobs
    assert_same(ours, theirs)


def test_axolotl_with_another_function():
    class Moved(stand_ins.TopKLogprobs):
        @staticmethod
        def forward(ctx, student_input, student_lm_head_weight, target_token_ids):
            return student_input

    with stand_ins.axolotl(Moved):
        message = r"axolotl .* with the parameters \(student_input, student_lm_head_weight, target_"
        with pytest.raises(RuntimeError, match=message):
            adapters.axolotl()
        module = sys.modules["axolotl.integrations.kd.kernels.liger"]
        assert module.LigerFusedLinearKLTopKLogprobFunction is Moved


@pytest.mark.parametrize(("temperature", "clamp"), [(1.0, None), (0.7, -4.0)])
@pytest.mark.parametrize("distilled", [False, True])
def test_veomni(distilled, temperature, clamp):
    student, (ids, logprobs, _, labels) = topk_problem(False)
    logprobs = logprobs.clamp(min=-12)  # the clamp acts on some, on both sides
    folder = "veomni.ops.kernels.cross_entropy."
    with stand_ins.veomni():
        plain_module = sys.modules[folder + "chunk_logprobs"]
        module = sys.modules[folder + "chunk_topk_distill"]

        def call(hidden, weight):
            if not distilled:
                options = (labels, temperature, 4, -100)
                return plain_module._ChunkedLinearLogProbs.apply(hidden, weight, *options)
            options = (labels, ids, logprobs, temperature, 4, -100, clamp)
            return module._ChunkedLinearTopkDistill.apply(hidden, weight, *options)

        theirs = step(call, *student)
        with adapters.veomni() as adapter:
            ours = step(call, *student)
        assert adapter.calls == 1
        assert module._ChunkedLinearTopkDistill is stand_ins.ChunkedTopkDistill
        assert plain_module._ChunkedLinearLogProbs is stand_ins.ChunkedLogProbs
    assert len(ours[0]) == (5 if distilled else 2)
    assert all(x[labels == -100].count_nonzero() == 0 for x in ours[0])
    assert_same(ours, theirs)


def test_veomni_with_another_function():
    class Moved(stand_ins.ChunkedTopkDistill):
        @staticmethod
        def forward(ctx, hidden_states, weight, labels, teacher_logits):
            return hidden_states

    with stand_ins.veomni(Moved):
        message = r"veomni .* with the parameters \(hidden_states, weight, labels, teacher_logits\)"
        with pytest.raises(RuntimeError, match=message):
            adapters.veomni()
        module = sys.modules["veomni.ops.kernels.cross_entropy.chunk_logprobs"]
        assert module._ChunkedLinearLogProbs is stand_ins.ChunkedLogProbs


class OneProcess:
    """A process group of one, as far as it is asked."""

    def size(self):
        return 1

    def rank(self):
        return 0


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group.size())
    return OneProcess()


def test_nemo_rl(group):
    hidden, weight, targets = problem()
    hidden, targets = hidden.view(6, 2, DIM), targets.view(2, 6)  # (T, B, D) and (B, T)
    options = (0, CLASSES, 4, group)
    with stand_ins.nemo_rl():
        module = sys.modules["nemo_rl.distributed.model_utils"]
        apply = lambda h, w: module.ChunkedDistributedHiddenStatesToLogprobs.apply(
            h, targets, w, *options
        )
        theirs = step(apply, hidden, weight)
        with adapters.nemo_rl() as adapter:
            ours = step(apply, hidden, weight)
            function = module.ChunkedDistributedHiddenStatesToLogprobs
            leaf = hidden.clone().requires_grad_()
            assert not function.apply(leaf, targets, weight, *options, True).requires_grad
    assert adapter.calls == 2
    assert_same(ours, theirs)


@pytest.mark.parametrize("fused", [True, False])
def test_nemo_rl_divides_the_logits_by_the_temperature(fused, group):
    hidden, weight, targets = problem()
    batch = (hidden.view(6, 2, DIM), targets.view(2, 6), weight, 0, CLASSES, 4, group)
    with stand_ins.nemo_rl(), adapters.nemo_rl():
        module = sys.modules["nemo_rl.distributed.model_utils"]
        function = module.ChunkedDistributedHiddenStatesToLogprobs
        model = lambda batch: function.apply(*batch).clone() if fused else torch.ones(2, 6, 9)
        output, processor = sys.modules[
            "nemo_rl.models.megatron.train"
        ].forward_with_post_processing_fn(
            iter([batch]),
            model,
            "processor",
            sampling_params=stand_ins.SamplingParams(temperature=0.5),
            use_fused_linear_logprobs=fused,
        )
        untempered = function.apply(*batch)
    assert processor == "processor"
    if fused:
        expected = plain(hidden.view(6, 2, DIM).transpose(0, 1), weight, batch[1], 0.5)[0]
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            untempered, plain(hidden.view(6, 2, DIM).transpose(0, 1), weight, batch[1])[0]
        )
    else:
        torch.testing.assert_close(output, torch.full((2, 6, 9), 2.0))  # logits, NeMo-RL's own way


# --- torchtitan


def cut_loss(loss_fn):
    titan = sys.modules["torchtitan.components.loss"]
    made = []
    for cls in (titan.ChunkedLossWrapper, adapters.torchtitan()):
        loss = cls(cls.Config(num_chunks=2, loss_fn=loss_fn))
        head = nn.Linear(DIM, CLASSES, bias=False)
        loss.set_lm_head(head)
        made.append((loss, head))
    return made


def titan_step(loss, head, extra):
    hidden, weight, targets = problem()

    def call(hidden, weight):
        with torch.no_grad():
            head.weight.copy_(weight)
        head.weight.grad = None
        value, metrics = loss(hidden.view(2, 6, DIM), targets.view(2, 6), 7.0, **extra)
        call.metrics = metrics
        return value

    outputs, (grad, _) = step(lambda h, w: call(h, w), hidden, weight)
    return (outputs, [grad, head.weight.grad]), call.metrics


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "DAPOLoss"])
def test_torchtitan(name):
    with stand_ins.torchtitan():
        titan = sys.modules["torchtitan.components.loss"]
        rl = sys.modules["torchtitan.experiments.rl.losses.dapo"]
        inner, extra = titan.CrossEntropyLoss, {}
        if name == "DAPOLoss":
            random = torch.Generator().manual_seed(3)
            inner, extra = (
                rl.DAPOLoss,
                {
                    "generator_logprobs": -5 * torch.rand(2, 6, generator=random),
                    "advantages": torch.randn(2, 6, generator=random),
                    "loss_mask": torch.rand(2, 6, generator=random) < 0.7,
                },
            )
        (wrapper, head), (cut, own_head) = cut_loss(inner.Config())
        theirs, their_metrics = titan_step(wrapper, head, extra)
        ours, our_metrics = titan_step(cut, own_head, extra)
        assert isinstance(cut, titan.ChunkedLossWrapper)
        assert type(cut).adapter.calls == 1
        assert rl.compute_logprobs is titan.compute_logprobs
        assert "forward" not in vars(own_head)
        logits = torch.randn(2, 6, 9)
        assert rl.compute_logprobs(logits, torch.ones(2, 6, dtype=torch.long)).shape == (2, 6)
    assert_same(ours, theirs)
    assert our_metrics.keys() == their_metrics.keys()
    for key, value in their_metrics.items():
        torch.testing.assert_close(our_metrics[key], value)


class SoftCapped(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def test_torchtitan_refuses_what_it_cannot_follow():
    with stand_ins.torchtitan():
        titan = sys.modules["torchtitan.components.loss"]
        own = sys.modules["own_losses"]
        cls = adapters.torchtitan()
        with pytest.raises(NotImplementedError, match=r"from compute_logprobs .*got LossOnLogits"):
            cls(cls.Config(loss_fn=own.LossOnLogits.Config()))
        loss = cls(cls.Config(loss_fn=titan.CrossEntropyLoss.Config()))
        hidden, _, targets = problem()
        with pytest.raises(RuntimeError, match="set_lm_head must be called"):
            loss(hidden.view(2, 6, DIM), targets.view(2, 6))
        loss.set_lm_head(SoftCapped(DIM, CLASSES))
        with pytest.raises(NotImplementedError, match="without a forward of its own, got SoftCap"):
            loss(hidden.view(2, 6, DIM), targets.view(2, 6))


# --- Megatron-core


def megatron_call(hidden, weight, targets, context, tied=False, factor=1.0):
    layer = types.SimpleNamespace(weight=None if tied else weight, bias=None, tp_group=OneProcess())
    return adapters.megatron_output_processor(
        hidden_states=hidden,
        output_layer=layer,
        output_weight=weight if tied else None,
        labels=targets,
        loss_mask=None,
        input_ids=None,
        packed_seq_params=None,
        context=context,
        scale_logits=lambda logits: logits * factor,
        config=types.SimpleNamespace(sequence_parallel=False),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 1.5, 12).view(2, 6)])
def test_megatron_output_processor(tied, temperature):
    hidden, weight, targets = problem()
    hidden, targets = hidden.view(6, 2, DIM), targets.view(2, 6)
    context = adapters.MegatronContext(temperature=temperature, outputs=("entropy",))

    def call(h, w):
        result = megatron_call(h, w, targets, context, tied, factor=0.5)
        return result.logprobs, result.entropy

    ours = step(call, hidden, weight)
    theirs = step(
        lambda h, w: plain(h.transpose(0, 1) * 0.5, w, targets, temperature), hidden, weight
    )
    assert_same(ours, theirs)


def test_megatron_output_processor_without_a_context_or_labels():
    hidden, weight, targets = problem()
    result = megatron_call(hidden.view(6, 2, DIM), weight, targets.view(2, 6), None)
    assert result.entropy is None
    torch.testing.assert_close(
        result.logprobs,
        plain(hidden.view(6, 2, DIM).transpose(0, 1), weight, targets.view(2, 6))[0],
    )
    with pytest.raises(ValueError, match="labels must be passed to the model"):
        megatron_call(hidden.view(6, 2, DIM), weight, None, None)
