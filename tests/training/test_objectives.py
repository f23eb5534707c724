"""Preferences and distillation have the losses of full logits, and of their definitions."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

import training.losses
from cut_cross_entropy import token_logprobs
from tests.training.test_resume import logged_losses
from tests.training.test_run import rows_of
from training.config import UsageError
from training.data import documents
from training.losses import CutLogits, Divergence, FullLogits, IdlePatchError, hidden_states
from training.objectives import Distillation, Preferences
from training.packing import IGNORED, collate_pairs, make_pairs
from training.train import main, make_objective

DPO = ["--objective", "dpo", "--data", "builtin"]
SUMS = 400


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A model with other features than the student's, and a softcap."""
    folder = tmp_path_factory.mktemp("teacher")
    config = transformers.Gemma2Config(
        vocab_size=256, hidden_size=48, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        final_logit_softcapping=2.0, attn_implementation="eager", pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def with_tokenizer(teacher_folder, model_folder):
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(teacher_folder)
    return teacher_folder


@pytest.fixture
def words(request, with_tokenizer):
    """The arguments of an objective."""
    if request.param == "dpo":
        return [*DPO, "--beta", "0.5"]
    return ["--objective", "distillation", "--teacher", str(with_tokenizer), *request.param]


EACH = pytest.mark.parametrize("words", ["dpo", []], ids=["dpo", "distillation"], indirect=True)


@pytest.mark.filterwarnings("ignore:(Model has `tie_word_emb|Setting `save_embedding):UserWarning")
@pytest.mark.parametrize(
    "words", ["dpo", ["--beta", "0.3"]], ids=["dpo", "distillation"], indirect=True
)
@pytest.mark.parametrize(
    "extra",
    [["--lora", "4", "--lora-head"], ["--gradient-accumulation", "2"], ["--dtype", "autocast"]],
    ids=" ".join,
)
def test_losses_are_those_of_full_logits(arguments, tmp_path, words, extra):
    if "--lora" in extra:
        pytest.importorskip("peft")
    found = {}
    for loss in ("full", "chunked"):
        output = tmp_path / loss
        more = ["--loss", loss, "--output", str(output), "--eval-fraction", "0.1", "--no-export"]
        assert main([*arguments, *words, *extra, *more, "--steps", "6"]) == 0
        rows = rows_of(output)
        found[loss] = [float(row["loss"]) for row in rows]
        found[loss, "held out"] = [float(row["eval_loss"]) for row in rows if row["eval_loss"]]
    assert len(found["full"]) == 6
    assert len(found["full", "held out"]) == 2
    tolerance = 2e-2 if "autocast" in extra else 2e-4
    for name in ("chunked", ("chunked", "held out")):
        full = "full" if name == "chunked" else ("full", "held out")
        assert found[name] == pytest.approx(found[full], abs=tolerance)
    assert min(found["full"]) < found["full"][0] * 0.99


@EACH
def test_resumed_losses_are_bit_identical(arguments, tmp_path, words):
    common = [*arguments, *words, "--no-export"]
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    assert main([*common, "--steps", "4"]) == 0
    assert main([*common, "--resume"]) == 0
    assert logged_losses(tmp_path / "run") == logged_losses(tmp_path / "whole")


@pytest.fixture
def model(model_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(a, b):
    for name, grad in a.items():
        torch.testing.assert_close(grad, b[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", [FullLogits(), CutLogits("chunked")], ids=["full", "chunked"])
def test_preferences_are_those_of_the_recipe(model, model_folder, loss):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    pair = [documents("builtin", completion=which) for which in ("chosen", "rejected")]
    rows = list(make_pairs(*pair, tokenizer, 32))
    assert len(rows) == SUMS
    # Sums of one and of two digits: the rows of a batch are padded.
    rows = [rows[i] for i in (0, 5, 61, 399)]
    objective = Preferences(0.5)
    objective.add_references(loss, model, rows, collate_pairs, 3)
    assert not model.training
    batch = collate_pairs(rows)
    losses, labels = objective(loss, model, batch)
    assert losses.shape == labels.shape == (4, 1)
    torch.testing.assert_close(losses, torch.full((4, 1), math.log(2)))

    def logprobs():
        hidden = hidden_states(model, batch["input_ids"])  # padding is on the right
        return token_logprobs(hidden, model.lm_head.weight, batch["labels"], shift=1).logprobs

    reference = logprobs().detach()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.3
    chosen, rejected = (logprobs() - reference).sum(-1).chunk(2)
    expected = -F.logsigmoid(0.5 * (chosen - rejected))
    losses, _ = objective(loss, model, batch)
    assert (losses - math.log(2)).abs().max() > 1e-3
    torch.testing.assert_close(losses[:, 0], expected, rtol=1e-5, atol=1e-6)
    first = gradients(model, losses.mean())
    assert_same_gradients(first, gradients(model, expected.mean()))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss", [FullLogits(), CutLogits("chunked")], ids=["full", "chunked"])
def test_distillation_is_the_divergence(model, teacher_folder, loss, beta):
    teacher = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = IGNORED
    p = model(ids).logits[:, :-1].double().softmax(-1)
    q = teacher(ids).logits[:, :-1].double().softmax(-1).detach()
    m = (1 - beta) * p + beta * q

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    expected = {0: kl(q, p), 1: kl(p, q)}.get(beta, beta * kl(q, m) + (1 - beta) * kl(p, m))
    values, kept = Distillation(teacher, beta)(loss, model, {"input_ids": ids, "labels": labels})
    assert kept.tolist() == labels[:, 1:].tolist()
    learned = kept != IGNORED
    found, expected = values[learned].mean(), expected[learned].mean().float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradient = gradients(model, expected)
    assert_same_gradients(gradients(model, found), gradient)
    assert all(p.grad is None for p in teacher.parameters())

    inputs = {"input_ids": ids, "labels": labels}
    for items, factor in ((None, 1.0), (3, int(learned.sum()) / 3)):
        mean = Distillation(teacher, beta).mean(loss, model, inputs, items)
        torch.testing.assert_close(mean, factor * expected, rtol=1e-5, atol=1e-6)
        scaled = {name: factor * grad for name, grad in gradient.items()}
        assert_same_gradients(gradients(model, mean), scaled)


def test_gradients_of_distillation_are_computed_in_the_forward(
    arguments, with_tokenizer, monkeypatch
):
    """Held-out divergences are of each token, those of training of the mean alone."""
    seen, original = [], training.losses.linear_divergence

    def counted(*args, **options):
        seen.append(options["reduction"])
        return original(*args, **options)

    monkeypatch.setattr(training.losses, "linear_divergence", counted)
    words = ["--objective", "distillation", "--teacher", str(with_tokenizer), "--no-export"]
    more = ["--eval-fraction", "0.1", "--steps", "3"]
    assert main([*arguments, *words, *more, "--loss", "chunked"]) == 0
    assert seen[:3] == ["mean"] * 3
    assert set(seen[3:]) == {"none"}


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_tokens_of_accumulated_batches_count_equally(
    arguments, with_tokenizer, model_folder, tmp_path, loss
):
    """Two batches of one sequence are one of two, though their numbers of labels differ."""
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": "why?", "completion": " so" * (1 + 4 * (i % 2))} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    # This student has no dropout, which depends on the batches.
    words = ["--model", str(with_tokenizer), "--data", str(path)]
    words += ["--objective", "distillation", "--teacher", str(model_folder)]
    words += ["--loss", loss, "--no-packing", "--no-export", "--steps", "4"]
    found = []
    for way in (["--batch-size", "2"], ["--batch-size", "1", "--gradient-accumulation", "2"]):
        output = tmp_path / f"out{len(found)}"
        assert main([*arguments, *words, *way, "--output", str(output)]) == 0
        found.append([float(row["loss"]) for row in rows_of(output)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(set(found[0])) == 3  # the first step has no learning rate


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_a_batch_without_labels_teaches_nothing(arguments, with_tokenizer, tmp_path, loss):
    """Long prompts fill whole sequences."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "why? " * 32, "completion": "so" * 8}] * 9
    path.write_text("\n".join(map(json.dumps, rows)))
    words = ["--objective", "distillation", "--teacher", str(with_tokenizer), "--data", str(path)]
    words += ["--batch-size", "1", "--loss", loss, "--no-export"]
    assert main([*arguments, *words]) == 0
    losses = [float(row["loss"]) for row in rows_of(tmp_path / "run")]
    assert 0 in losses
    assert max(losses) > 0.1


def test_a_model_whose_logits_are_needed_is_refused(model, teacher_folder):
    teacher = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    teacher.get_output_embeddings().register_full_backward_hook(lambda *_: None)
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    inputs["labels"] = inputs["input_ids"]
    with pytest.raises(IdlePatchError, match="patch of Gemma2ForCausalLM cannot do without"):
        CutLogits("chunked").divergences(model, teacher, inputs, Divergence(0.0))


class TestPairs:
    def test_builtin_is_right_and_wrong(self):
        for which, right in (("chosen", True), ("rejected", False)):
            found = list(documents("builtin", completion=which))
            assert len(found) == SUMS
            for document in found:
                a, b = document.prompt.removesuffix(" =").split(" + ")
                assert (int(a) + int(b) == int(document.text)) is right

    def test_of_a_file(self, arguments, tmp_path, capsys):
        path = tmp_path / "pairs.jsonl"
        rows = [{"prompt": "One?", "chosen": " yes", "rejected": " no", "text": ""}] * 9
        path.write_text("\n".join(map(json.dumps, rows)))
        words = ["--objective", "dpo", "--data", str(path), "--batch-size", "3", "--steps", "3"]
        assert main([*arguments, *words, "--no-export"]) == 0
        assert "9 sequences" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "a", "chosen": "b"}, "line 1: must be an object with 'prompt', 'chosen'"),
            ({"text": "a"}, "line 1: must be an object with 'prompt', 'chosen' and 'rejected'"),
            (
                {"prompt": "a", "chosen": "b" * 20, "rejected": "b"},
                "line 1: a prompt with its completion has 21 tokens, more than --sequence-length",
            ),
        ],
        ids=["no rejected", "text", "long"],
    )
    def test_what_is_no_pair(self, arguments, tmp_path, capsys, row, message):
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps(row))
        assert main([*arguments, "--objective", "dpo", "--data", str(path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--objective", "distillation"], "--objective distillation and --teacher need each other"),
        (["--teacher", "x"], "--objective distillation and --teacher need each other"),
        (["--beta", "0.1"], "--beta is an option of --objective dpo, above 0, and distillation"),
        ([*DPO, "--beta", "0"], "--beta is an option of --objective dpo, above 0"),
        (
            ["--objective", "distillation", "--teacher", "x", "--beta", "1.5"],
            "distillation, from 0 to 1",
        ),
        ([*DPO, "--beta", "-1"], "--beta must be at least 0, got -1.0"),
        ([*DPO, "--streaming"], "--objective dpo excludes --streaming"),
        ([*DPO, "--data-column", "body"], "and --data-column"),
        ([*DPO, "--fsdp"], "--objective dpo excludes --fsdp and --deepspeed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named(arguments, capsys, changed, message):
    assert main([*arguments, *changed]) == 2
    assert message in capsys.readouterr().err


def test_an_implementation_without_divergences(config, with_tokenizer):
    changed = {"objective": "distillation", "teacher": str(with_tokenizer), "loss": "torch_compile"}
    with pytest.raises(UsageError, match="--loss torch_compile: impl of linear_divergence must be"):
        make_objective(dataclasses.replace(config, **changed), 256, torch.device("cpu"))


def test_a_teacher_that_does_not_fit(arguments, model_folder, tmp_path, capsys):
    words = [*arguments, "--objective", "distillation", "--teacher"]
    other = tmp_path / "other"
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(other)
    config = transformers.AutoConfig.from_pretrained(model_folder)
    config.vocab_size = 300
    transformers.LlamaForCausalLM(config).save_pretrained(other)
    assert main([*words, str(other)]) == 2
    assert "--teacher has 300 token ids, --model 256" in capsys.readouterr().err
