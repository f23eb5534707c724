"""The adapters against the trainers themselves, in an environment that has them.

Not collected with the other tests. Each test skips where its trainer is missing; none needs a GPU::

    python -m pytest -p no:cacheprovider -rs tests/adapters/with_trainers.py

Run with verl 0.9.1, torchtitan 0.3.0, LLaMA-Factory 0.9.5, OpenRLHF 0.11.2, axolotl 0.19.0, VeOmni
0.1.12 and Megatron-core 0.19.2 from PyPI, and prime-rl at 559b447 and NeMo-RL at 7ea279a from their
repositories, each in a folder of PYTHONPATH. Without their dependencies, which want a GPU::

    pip install --no-deps --target FOLDER verl==0.9.1 ...
    pip download --no-deps --python-version 3.12 --only-binary :all: \\
        megatron-core==0.19.2  # a wheel to unzip
    pip install --no-deps --target FOLDER ray jsonschema jsonschema-specifications referencing \\
        rpds-py attrs tensordict orjson pyvers cloudpickle importlib_metadata zipp omegaconf \\
        hydra-core antlr4-python3-runtime==4.9.3 codetiming torchdata spmd-types tyro \\
        docstring-parser shtab typeguard

All 34 pass; one that is skipped did not find its trainer.
"""

import copy
import importlib
import importlib.util
import logging
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cut_cross_entropy import adapters
from cut_cross_entropy.lazy.logits import LazyLogits
from cut_cross_entropy.transformers import call_count, cce_patch
from tests.adapters import stand_ins
from tests.adapters.parity import (
    CLASSES,
    DIM,
    assert_same,
    of_axolotl_options,
    problem,
    step,
    topk_problem,
)
from tests.support import is_computed
from tests.transformers.models import batch, llama

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def hollow(monkeypatch, *packages):
    """Import modules of packages without what their ``__init__`` imports, such as vLLM."""
    for name in packages:
        parent, _, last = name.rpartition(".")
        roots = sys.modules[parent].__path__ if parent else sys.path
        found = [Path(root) / last for root in roots if (Path(root) / last).is_dir()]
        if not found:
            pytest.skip(f"{name} is not installed")
        package = types.ModuleType(name)
        package.__path__ = [str(found[0])]
        monkeypatch.setitem(sys.modules, name, package)


@pytest.fixture
def megatron(one_process, monkeypatch):
    """Megatron's own process groups; its buffers are on the CPU, its random state is PyTorch's."""
    state = pytest.importorskip("megatron.core.parallel_state")
    state.initialize_model_parallel()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    tracker = types.SimpleNamespace(fork=nullcontext)
    monkeypatch.setattr("megatron.core.tensor_parallel.get_cuda_rng_tracker", lambda: tracker)
    yield
    state.destroy_model_parallel()


# --- verl


def test_verl_with_its_triton_backend():
    common = pytest.importorskip("verl.models.transformers.dense_common")
    inputs = batch()
    inputs.pop("labels")
    results = []
    for forward in (common.forward_with_torch_backend, common.forward_with_triton_backend):
        model = llama()
        model.forward = types.MethodType(forward, model)
        with adapters.verl() as adapter:
            output = model(**inputs, temperature=0.7, return_dict=True)
        logprobs, entropy = (x.flatten() for x in (output.log_probs, output.entropy))
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        grads = [parameter.grad for parameter in model.parameters()]
        results.append(([logprobs.detach(), entropy.detach()], grads))
    assert adapter.calls == 1
    assert_same(results[1], results[0])


def test_verl_with_its_liger_backend():
    functional = pytest.importorskip("verl.utils.experimental.torch_functional")
    hidden, weight, targets = problem()
    call = lambda backend: step(
        lambda h, w: functional.FusedLinearForPPO(impl_backend=backend)(
            h.view(2, 6, DIM), w, targets.view(2, 6), 0.7
        ),
        hidden,
        weight,
    )
    with adapters.liger() as adapter:
        ours = call("liger")
    assert adapter.calls == 1
    assert_same(ours, call("torch"))
    call("liger")
    assert adapter.calls == 1


def test_verl_with_megatron(megatron):
    fused = pytest.importorskip("verl.models.mcore.model_forward_fused")
    hidden, weight, targets = problem()
    call = lambda h, w: fused.fused_output_processor(
        hidden_states=h.view(12, 1, DIM),
        output_layer=None,
        output_weight=w,
        labels=targets.view(1, 12),
        context=fused.FusedOutputProcessorContext(temperature=0.7),
        config=types.SimpleNamespace(sequence_parallel=False, config_logger_dir=""),
    )
    with adapters.verl() as adapter:
        ours = step(lambda h, w: (lambda o: (o.log_probs, o.entropy))(call(h, w)), hidden, weight)
    assert adapter.calls == 1
    functional = importlib.import_module("verl.utils.experimental.torch_functional")
    theirs = step(lambda h, w: functional.FusedLinearForPPO()(h, w, targets, 0.7), hidden, weight)
    assert_same(ours, theirs)


# --- prime-rl


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_prime_rl(softcap, monkeypatch):
    layers = "prime_rl.trainer.models.layers"
    hollow(monkeypatch, "prime_rl", "prime_rl.trainer", "prime_rl.trainer.models", layers)
    lm_head = importlib.import_module(f"{layers}.lm_head")
    gemma = importlib.import_module(f"{layers}.lm_head_gemma")
    if softcap is None:
        head = lm_head.FusedOutputLinear(DIM, CLASSES, chunk_size=5)
    else:
        head = gemma.GemmaFusedOutputLinear(DIM, CLASSES, chunk_size=5, softcap=softcap)
    hidden, weight, targets = problem()
    temperature = torch.linspace(0.5, 2.0, 12).view(2, 6)

    def call(hidden, weight):
        head.weight = None  # a leaf of the comparison stands for the parameter
        head.__dict__["weight"] = weight
        output = head(hidden.view(2, 6, DIM), targets.view(2, 6), temperature=temperature)
        return output["logprobs"], output["entropy"].detach()

    theirs = step(call, hidden, weight)
    with adapters.prime_rl() as adapter:
        ours = step(call, hidden, weight)
    assert adapter.calls == 1
    assert_same(ours, theirs)


# --- NeMo-RL


def test_nemo_rl(one_process):
    utils = pytest.importorskip("nemo_rl.distributed.model_utils")
    hidden, weight, targets = problem()
    # Its package for Megatron needs more than can be installed without a GPU.
    with stand_ins.modules(nemo_rl__models__megatron__train=stand_ins.STEP):
        call = lambda h, w: utils.from_parallel_hidden_states_to_logprobs(
            h.view(6, 2, DIM), w, False, targets.view(2, 6), 0, CLASSES, one_process, chunk_size=4
        )
        theirs = step(call, hidden, weight)
        with adapters.nemo_rl() as adapter:
            ours = step(call, hidden, weight)
        assert adapter.calls == 1
    assert_same(ours, theirs)


# --- axolotl


def check_step(make, call, student):
    """Check that a step under an adapter, and one after it, are those of the trainer."""
    theirs = step(call, *student)
    with make() as adapter:
        ours = step(call, *student)
    assert adapter.calls == 1
    assert_same(ours, theirs)
    assert_same(step(call, *student), theirs)
    assert adapter.calls == 1


@pytest.mark.parametrize("normalised", [False, True])
@of_axolotl_options
def test_axolotl(normalised, beta, temperature, hard, soft, bias, monkeypatch):
    pytest.importorskip("liger_kernel")
    packages = ("axolotl", "axolotl.integrations", "axolotl.integrations.kd")
    hollow(monkeypatch, *packages, "axolotl.integrations.kd.kernels")
    kernels = importlib.import_module("axolotl.integrations.kd.kernels.liger")
    student, (ids, logprobs, mask, labels) = topk_problem(bias)
    module = kernels.LigerFusedLinearKLTopKLogprobLoss(
        hard, soft, temperature, beta, -100, False, 4, hard > 0, normalised
    )
    call = lambda hidden, weight, bias=None: module(
        weight, hidden, ids, logprobs, mask, labels, bias
    )
    check_step(adapters.axolotl, call, student)


# --- VeOmni


@pytest.mark.parametrize(("temperature", "clamp"), [(1.0, None), (0.7, -4.0)])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_veomni(distilled, aligned, temperature, clamp, monkeypatch):
    folder = "veomni.ops.kernels.cross_entropy"
    packages = ("veomni", "veomni.ops", "veomni.ops.kernels", folder, "veomni.distributed")
    hollow(monkeypatch, *packages)
    state = types.SimpleNamespace(sp_enabled=False)
    parallel = types.SimpleNamespace(get_parallel_state=lambda: state)
    monkeypatch.setitem(sys.modules, "veomni.distributed.parallel_state", parallel)
    logprobs_module = importlib.import_module(f"{folder}.chunk_logprobs")
    distillation = importlib.import_module(f"{folder}.chunk_topk_distill")
    student, (ids, logprobs, _, labels) = topk_problem(False)
    options = {"chunk_size": 4, "temperature": temperature}
    options["shift_labels"] = labels if aligned else None

    def call(hidden, weight):
        if not distilled:
            return logprobs_module.chunk_logprobs_function(hidden, weight, labels, **options)
        return distillation.chunk_topk_distill_function(
            hidden, weight, labels, ids, logprobs, log_prob_min_clamp=clamp, **options
        )

    check_step(adapters.veomni, call, student)


# --- torchtitan


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "DAPOLoss", "GRPOLoss"])
def test_torchtitan(name, monkeypatch):
    titan = pytest.importorskip("torchtitan.components.loss")
    experiments = "torchtitan.experiments"
    hollow(monkeypatch, experiments, f"{experiments}.rl")
    losses = importlib.import_module(f"{experiments}.rl.losses")
    inner = getattr(losses, name, None) or getattr(titan, name)
    hidden, weight, targets = problem()
    random = torch.Generator().manual_seed(3)
    extra = {
        "generator_logprobs": -5 * torch.rand(2, 6, generator=random),
        "advantages": torch.randn(2, 6, generator=random),
        "loss_mask": torch.rand(2, 6, generator=random) < 0.7,
    }
    results, all_metrics = [], []
    for cls in (titan.ChunkedLossWrapper, adapters.torchtitan()):
        loss = cls.Config(num_chunks=2, loss_fn=inner.Config()).build()
        head = nn.Linear(DIM, CLASSES, bias=False)
        loss.set_lm_head(head)
        head.weight.data.copy_(weight)
        leaf = hidden.clone().requires_grad_()
        value, metrics = loss(
            leaf.view(2, 6, DIM),
            targets.view(2, 6),
            7.0,
            **(extra if inner is not titan.CrossEntropyLoss else {}),
        )
        value.backward()
        results.append(([value.detach()], [leaf.grad, head.weight.grad]))
        all_metrics.append(metrics)
        assert isinstance(loss, titan.ChunkedLossWrapper)
    assert cls.adapter.calls == 1
    assert_same(results[1], results[0])
    assert all_metrics[0].keys() == all_metrics[1].keys()
    for key, metric in all_metrics[0].items():
        torch.testing.assert_close(all_metrics[1][key], metric, rtol=1e-4, atol=1e-5, msg=key)


# --- LLaMA-Factory and OpenRLHF: lazy logits


def patched_and_plain():
    """Two models with the same weights in float64, the second one with lazy logits."""
    plain = llama().double()
    return plain, cce_patch(copy.deepcopy(plain), lazy_logits=True)


def gradients(model, outputs):
    sum(x.square().sum() for x in outputs if x.requires_grad).backward()
    grads = [p.grad for p in model.parameters()]
    return [x.detach() for x in outputs], grads


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_llama_factory(ld_alpha, monkeypatch):
    hollow(monkeypatch, "llamafactory", "llamafactory.train")
    anything = types.SimpleNamespace
    stand_in = {
        "llamafactory.hparams": anything(FinetuningArguments=None, ModelArguments=None),
        "llamafactory.model": anything(
            find_all_linear_modules=None,
            load_model=None,
            load_tokenizer=None,
            load_valuehead_params=None,
        ),
        "llamafactory.extras.misc": anything(get_device_name=None),
        "llamafactory.extras.packages": anything(
            is_apollo_available=lambda: False,
            is_galore_available=lambda: False,
            is_ray_available=lambda: False,
        ),
        "llamafactory.extras.constants": anything(IGNORE_INDEX=-100, SWANLAB_CONFIG=None),
        "llamafactory.extras": anything(
            logging=anything(get_logger=logging.getLogger), __path__=[]
        ),
    }
    for name, module in stand_in.items():
        monkeypatch.setitem(sys.modules, name, module)
    utils = importlib.import_module("llamafactory.train.trainer_utils")
    inputs = batch(4)
    labels = inputs.pop("labels")
    results = []
    for model in patched_and_plain():
        logits = model(**inputs, return_dict=True, use_cache=False).logits.to(torch.float64)
        logps, lengths = utils.get_batch_logps(logits=logits, labels=labels, ld_alpha=ld_alpha)
        chosen, _ = logits.split(2, dim=0)  # as its DPO trainer does, for its log
        results.append(gradients(model, (logps, lengths, chosen.mean().detach())))
    assert call_count(model) == 2  # the log-probabilities, and the mean
    assert_same(results[1], results[0], 1e-9, 1e-10)


def logprobs_of(logits, ids):
    """Stand in for the function that would call flash-attn's, where that is installed."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def test_openrlhf(monkeypatch):
    hollow(monkeypatch, "openrlhf", "openrlhf.models")
    nothing = dict.fromkeys(("index_first_axis", "pad_input", "rearrange", "unpad_input"))
    ids = batch(4)["input_ids"]

    def run(model):
        actor = classes.Actor(model, temperature=0.7)
        actor.packing_samples = False
        logprobs, output = actor(
            ids,
            torch.ones(4, 5),
            attention_mask=torch.ones_like(ids),
            return_output=True,
            return_entropy=True,
        )
        return output.logits, gradients(model, (logprobs, output.entropy))

    with stand_ins.modules(
        flash_attn__bert_padding=nothing, flash_attn__utils__distributed={"all_gather": None}
    ):
        classes = importlib.import_module("openrlhf.models.actor")
        plain, model = patched_and_plain()
        _, expected = run(plain)
        for function in (classes.log_probs_from_logits, logprobs_of):
            monkeypatch.setattr(classes, "log_probs_from_logits", function)
            model.zero_grad()
            calls = call_count(model)
            logits, actual = run(model)
            assert call_count(model) == calls + 2  # the entropies, and what is of the ids alone
            assert isinstance(logits, LazyLogits)
            assert not is_computed(logits)
            assert_same(actual, expected, 1e-5, 1e-6)  # it computes in float32


# --- Megatron-core


@pytest.mark.parametrize("tied", [False, True])
def test_megatron_output_processor(tied, megatron):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
    )
    torch.manual_seed(0)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=CLASSES,
        max_sequence_length=16,
        parallel_output=True,
        share_embeddings_and_output_weights=tied,
    )
    ids = torch.randint(0, CLASSES, (2, 9))
    labels = ids.roll(-1, 1)
    positions = torch.arange(9).expand(2, 9)
    mask = torch.ones(9, 9).triu(1).bool()[None, None]
    results = []
    for ours in (False, True):
        model.zero_grad()
        if ours:
            context = adapters.MegatronContext(temperature=0.7, outputs=("entropy",))
            output = model(
                ids,
                positions,
                mask,
                labels=labels,
                output_processor=adapters.megatron_output_processor,
                output_processor_context=context,
            )
            logprobs, entropy = output.logprobs, output.entropy
        else:
            all_logprobs = (model(ids, positions, mask) / 0.7).log_softmax(-1)
            logprobs = all_logprobs.gather(-1, labels[..., None])[..., 0]
            entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append(
            ([logprobs.detach(), entropy.detach()], [torch.cat([g.flatten() for g in grads])])
        )
    assert_same(results[1], results[0])
