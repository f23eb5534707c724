"""Every class of the mappings in a tiny configuration, and the sweep's own honesty."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.tuners.lora import LoraLayer

from cut_cross_entropy.transformers import cce_patch, cce_unpatch, is_patched
from cut_cross_entropy.transformers.heads import find_heads
from cut_cross_entropy.transformers.registry import classes_of_type
from tests.transformers import sweep
from tests.transformers.families import FAMILIES
from tests.transformers.tiny import classes, model_class, tiny_model

LISTED = classes()
# A family's class that the two mappings leave out.
UNLISTED = {
    cls.__name__: family
    for family in FAMILIES
    for cls in classes_of_type(family)
    if cls.__name__ not in LISTED
}

RELEASE = ".".join(transformers.__version__.split(".")[:2])
LOGITS_MADE = {
    "ChameleonForConditionalGeneration": "__setitem__",
    "MusicgenForCausalLM": "no linear head was called",
    "MusicgenMelodyForCausalLM": "no linear head was called",
    "ProphetNetForCausalLM": "log_softmax",
}
NOT_RUN = {
    "DiffusionGemmaForBlockDiffusion": "the first output is no loss",
    "Dots3NoteForCausalLM": "million parameters",
    "Dots3NoteForConditionalGeneration": "adapter_in_dim",
    "FastVlmForConditionalGeneration": "timm",
    "Gemma3nForConditionalGeneration": "timm",
    "Gemma4AssistantForCausalLM": "layer types producing a cache",
    "Gemma4UnifiedAssistantForCausalLM": "layer types producing a cache",
    "PI0ForConditionalGeneration": "state",
    "PerceptionLMForConditionalGeneration": "timm",
}

# PEFT's own limits: the name of the head is that of other layers too, no linear head, inputs.
NOT_ADAPTED = {
    "GitForCausalLM": "Target module",
    "MusicgenForCausalLM": "no head is a linear layer",
    "MusicgenMelodyForCausalLM": "no head is a linear layer",
    "PPFormulaNetForConditionalGeneration": "get_input_embeddings",
}
HIDDEN_HEADS = ("BlipForConditionalGeneration", "NemotronH_Omni_Reasoning_V3")


@pytest.mark.filterwarnings("ignore")  # what models warn about; the patch's are in the outcome
@pytest.mark.parametrize("name", [name for name in {**LISTED, **UNLISTED} if name not in NOT_RUN])
def test_a_class_patched_equals_itself_unpatched(name):
    result = sweep.compare(name, {**LISTED, **UNLISTED}[name])
    if name in LOGITS_MADE:
        assert (result.outcome, LOGITS_MADE[name] in result.detail) == ("logits made", True), result
    else:
        assert result.outcome == "equal", result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in LISTED if name not in NOT_RUN | NOT_ADAPTED])
def test_a_class_with_an_adapter_on_its_head(name):
    """LoRA, or DoRA; weights of the base are frozen."""
    options = {"use_dora": list(LISTED).index(name) % 4 == 0}
    result = sweep.compare(name, LISTED[name], partial(sweep.with_adapter, **options))
    if name in LOGITS_MADE:
        assert (result.outcome, LOGITS_MADE[name] in result.detail) == ("logits made", True), result
    else:
        assert result.outcome == "equal", result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HIDDEN_HEADS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_on_a_head_that_the_model_does_not_name(name, use_dora):
    """Its parts are no heads of their own."""
    change = partial(sweep.with_adapter, use_dora=use_dora)
    assert sweep.compare(name, LISTED[name], change).outcome == "equal"
    model = change(tiny_model(model_class(name), LISTED[name]))
    (head,) = find_heads(model)
    assert isinstance(head, LoraLayer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_RUN)
def test_a_class_that_does_not_run_fails_before_it_is_patched(name):
    result = sweep.compare(name, LISTED[name])
    if NOT_RUN[name] == "timm" and result.outcome == "equal":
        return  # where timm is installed
    assert (result.outcome, NOT_RUN[name] in result.detail) == ("not run", True), result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_ADAPTED)
def test_a_class_that_takes_no_adapter_on_its_head(name):
    result = sweep.compare(name, LISTED[name], sweep.with_adapter)
    assert (result.outcome, NOT_ADAPTED[name] in result.detail) == ("not run", True), result


def test_the_goals_of_the_sweep():
    if RELEASE != "5.23":
        pytest.skip(f"counted for transformers 5.23, this is {RELEASE}")
    assert len(LISTED) == 268
    assert len(LISTED) - len(NOT_RUN) >= 256
    assert len(LISTED) - len(NOT_RUN) - len(LOGITS_MADE) >= 252


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_patched_by_name(family):
    cce_patch(family)
    try:
        assert is_patched(family)
    finally:
        cce_unpatch(family)
    assert not is_patched(family)


@pytest.fixture
def broken(monkeypatch):
    """A patch with a mistake in the gradient, or in what it computes."""

    def apply(change):
        from cut_cross_entropy.lazy import cross_entropy

        right = cross_entropy.linear_cross_entropy
        wrong = lambda *a, **k: change(right, a, k)
        monkeypatch.setattr(cross_entropy, "linear_cross_entropy", wrong)

    return apply


def test_the_sweep_sees_a_wrong_loss(broken):
    broken(lambda right, a, k: right(*a, **k) * 1.001)
    assert sweep.compare("LlamaForCausalLM", "llama").outcome == "wrong"


def test_the_sweep_sees_a_wrong_gradient(broken):
    broken(lambda right, a, k: right(a[0], a[1].detach(), *a[2:], **k))
    assert sweep.compare("LlamaForCausalLM", "llama").outcome == "wrong"


def test_the_sweep_sees_a_forgotten_softcap(broken):
    broken(lambda right, a, k: right(*a, **(k | {"softcap": None})))
    assert sweep.compare("Gemma2ForCausalLM", "gemma2").outcome == "wrong"


def test_the_sweep_sees_logits_that_nobody_mentions(broken):
    def with_logits(right, a, k):
        e, c, targets = a
        logits = e @ c.T
        if k["shift"]:
            logits, targets = logits[:, :-1], targets[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=k["reduction"])

    broken(with_logits)
    result = sweep.compare("LlamaForCausalLM", "llama")
    assert result.outcome == "wrong"
    assert "without a word" in result.detail


def test_the_sweep_sees_a_crash(broken):
    def crash(right, a, k):
        raise TypeError("broken")

    broken(crash)
    assert sweep.compare("LlamaForCausalLM", "llama").outcome == "crash"


def test_the_table_counts_what_it_lists():
    results = [
        sweep.Result("A", "a", "equal", rows_before=7),
        sweep.Result("B", "b", "not run", "no | such module"),
    ]
    page = sweep.table(results)
    assert "| 2 | 1 | 1 | 0 | 0 | 0 |" in page
    assert "| B | b | not run | | | | no \\| such module |" in page


def test_a_missing_gradient_is_no_equal_gradient():
    grads = {"a": torch.ones(3), "b": None}
    assert sweep.gradient_error(grads, {"a": None, "b": None}) == (1.0, "a")
    assert sweep.gradient_error(grads, {"a": torch.ones(3), "b": torch.ones(1)})[1] == "b"
    assert sweep.gradient_error(grads, {"a": torch.full((3,), torch.nan), "b": None})[1] == "a"
