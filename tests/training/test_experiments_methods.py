"""Methods of the experiments that are other packages', largest batches, prose, and resumed runs."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers

import cut_cross_entropy
from docs import training_runs
from experiments import comparison, corpus, distill, finetune, largest, peers
from experiments.comparison import MEASUREMENTS, cut_windows
from tests.transformers.models import SIZES, llama
from training.loop import Schedule, draw_batches, train_steps
from training.losses import FullLogits, plain_head
from training.models import load_model

CPU = torch.device("cpu")
SCHEDULE = Schedule(learning_rate=1e-2)


def cross_entropy(e, c, targets):
    return F.cross_entropy(e @ c.T, targets)


def batches(steps=3, sequences=4):
    return draw_batches(cut_windows(torch.arange(600) % 131, 20), steps, sequences, seed=0)


class TestPeers:
    @pytest.fixture
    def apple(self, tmp_path):
        """A package of this one's name whose modules import each other by it."""
        folder = tmp_path / "apple" / peers.OWN
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "constants.py").write_text("FACTOR = 2.0")
        (folder / "cce.py").write_text(
            "from cut_cross_entropy.constants import FACTOR\n"
            "import torch.nn.functional as F\n"
            "def cce_linear_cross_entropy(e, c, targets):\n"
            "    return FACTOR * F.cross_entropy(e @ c.T, targets)\n"
        )
        return folder.parent

    def test_apples_package_leaves_this_one_in_its_place(self, apple):
        expected, model, ids = FullLogits(), llama(), batches()[0]
        expected.prepare(model)  # which imports more of this package
        before = {name for name in sys.modules if name.split(".")[0] == peers.OWN}
        path = list(sys.path)
        loss = peers.peer_loss("apple", apple)
        assert loss(model, ids).item() == pytest.approx(2 * expected(model, ids).item(), rel=1e-5)
        assert sys.modules[peers.OWN] is cut_cross_entropy
        assert {name for name in sys.modules if name.split(".")[0] == peers.OWN} == before
        assert sys.path == path

    def test_what_is_not_installed_is_named(self, tmp_path, monkeypatch, capsys):
        with pytest.raises(ImportError, match="method apple needs --apple FOLDER"):
            comparison.loss_of("apple", CPU, tmp_path)
        monkeypatch.setitem(sys.modules, "liger_kernel", None)
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
        arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--methods", "liger"]
        assert finetune.main(arguments) == 2
        assert "method liger needs the package liger-kernel" in capsys.readouterr().err

    def test_trl_computes_the_loss_of_full_logits(self):
        pytest.importorskip("trl")
        expected, model, ids = FullLogits(), llama(), batches()[0]
        expected.prepare(model)
        found = peers.peer_loss("trl", None)(model, ids).item()
        assert found == pytest.approx(expected(model, ids).item(), rel=1e-5)

    def test_steps_are_those_of_full_logits(self):
        losses = {}
        for loss in (FullLogits(), peers.PeerLoss(cross_entropy)):
            steps = train_steps(llama(attention_dropout=0.0), loss, batches(), SCHEDULE)
            losses[type(loss).__name__] = [step.item() for step in steps]
        assert losses["PeerLoss"] == pytest.approx(losses["FullLogits"], rel=1e-5)
        assert len(set(losses["PeerLoss"])) == 3

    def test_inputs_have_the_dtype_of_autocast(self):
        seen = []

        def loss(e, c, targets):
            seen.append((e.dtype, c.dtype, torch.is_autocast_enabled("cpu")))
            return cross_entropy(e.float(), c.float(), targets)

        next(train_steps(llama(), peers.PeerLoss(loss), batches(), SCHEDULE, autocast=True))
        assert seen == [(torch.bfloat16, torch.bfloat16, False)]


class TestPlainHead:
    def test_weight(self):
        model = llama()
        assert plain_head(model) is model.lm_head.weight
        assert model.training

    def test_dtype_of_training(self):
        model = llama().bfloat16()
        assert plain_head(model) is model.lm_head.weight

    def test_softcap(self):
        config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=30.0)
        model = transformers.Gemma2ForCausalLM(config)
        with pytest.raises(ValueError, match="Gemma2ForCausalLM must be a product without bias"):
            plain_head(model)
        config.final_logit_softcapping = None
        plain_head(transformers.Gemma2ForCausalLM(config))

    def test_scale(self):
        config = transformers.GraniteConfig(**SIZES, logits_scaling=2.0)
        with pytest.raises(ValueError, match="softcap and scale"):
            plain_head(transformers.GraniteForCausalLM(config))

    def test_bias(self):
        model = llama()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(131))
        with pytest.raises(ValueError, match="without bias"):
            peers.PeerLoss(cross_entropy).prepare(model)


class Limited(FullLogits):
    """A loss for which batches above a number of sequences are too large."""

    def __init__(self, most):
        self.most, self.tried = most, []

    def __call__(self, model, input_ids):
        self.tried.append(len(input_ids))
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("no room for so many")
        return super().__call__(model, input_ids)


@pytest.mark.parametrize("most", [1, 4, 5, 37])
def test_largest_batch(most):
    loss = Limited(most)
    windows = batches().flatten(0, 1)  # fewer than the largest batch
    found = largest.largest_batch(llama(), loss, windows, SCHEDULE, 4, autocast=False)
    assert most - max(1, most // 16) < found["sequences"] <= most
    assert found["tokens"] == 20 * found["sequences"]
    assert found["ms_per_step"] > 0
    assert found["stopped_by"] == "no room for so many"
    assert max(loss.tried) <= max(4, 2 * most)


def test_a_batch_that_frees_memory_in_each_step_does_not_fit(monkeypatch):
    loss = Limited(100)
    # Two calls a batch, before and after its second step.
    monkeypatch.setattr(
        largest, "_times_freed", lambda _: sum(tried > 8 for tried in loss.tried), raising=True
    )
    windows = batches().flatten(0, 1)
    found = largest.largest_batch(llama(), loss, windows, SCHEDULE, 4, autocast=False)
    assert (found["sequences"], max(loss.tried)) == (8, 16)
    assert "free memory in the second step" in found["stopped_by"]


def test_no_batch_fits():
    found = largest.largest_batch(llama(), Limited(0), batches()[0], SCHEDULE, 4, autocast=False)
    assert found == {"sequences": 0, "tokens": 0, "stopped_by": "no room for so many"}


class TestProse:
    def test_paragraphs(self, tmp_path):
        long = "A paragraph that is long enough to be one, with <em>inline</em> words of <a>all</a>"
        (tmp_path / "b.html").write_text(
            f"<html><head><title>{long}</title></head><body><ul><li>Next</li></ul><h2>Title</h2>"
            f"<div class='para'>\n\t{long} &amp; kinds.</div><pre>{long} code</pre>"
            f"<div>{long} too.</div></body></html>"
        )
        (tmp_path / "c.html").write_text(f"<p>{long} too.<p>{long} of the last")
        (tmp_path / "a.txt").write_text("Text as it is.\n")
        (tmp_path / "d.png").write_bytes(b"\xff")
        plain = long.replace("<em>", "").replace("</em>", "").replace("<a>", "")
        plain = plain.replace("</a>", "")
        assert corpus.prose(tmp_path) == [
            "Text as it is.",
            f"{plain} & kinds.\n\n{plain} too.",
            f"{plain} of the last",
        ]
        assert corpus.prose(tmp_path / "a.txt") == ["Text as it is."]

    def test_no_text(self, tmp_path):
        with pytest.raises(ValueError, match=r"--text must name \.txt or \.html files with text"):
            corpus.prose(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"--text '.*missing'"):
            corpus.prose(tmp_path / "missing")


def test_windows_begin_with_the_first_token():
    windows = cut_windows(torch.arange(1, 12), 4, first=0)
    assert windows.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]


@pytest.fixture
def arguments(tmp_path, model_folder):
    """A command that fine-tunes on a text file."""
    (tmp_path / "text.txt").write_text("All work and no play makes a dull test. " * 25)
    common = ["--smoke", "--device", "cpu", "--commit", "abc", "--out", str(tmp_path)]
    return [*common, "--text", str(tmp_path / "text.txt"), "--model", str(model_folder)]


def test_resumed_runs(arguments, tmp_path, model_folder, capsys):
    path = tmp_path / f"finetune_{model_folder.name}_cpu.json"
    assert finetune.main([*arguments, "--methods", "full"]) == 0
    first = json.loads(path.read_text())
    more = [*arguments, "--resume", "--methods", "full", "chunked", "--seeds", "2"]
    assert finetune.main(more) == 0
    second = json.loads(path.read_text())
    assert second["runs"][0] == first["runs"][0]  # its time too: it was not run again
    assert second["before"] == first["before"]
    runs = [("full", 0), ("chunked", 0), ("full", 1), ("chunked", 1)]
    assert [(run["method"], run["seed"]) for run in second["runs"]] == runs
    assert second["data"]["text"] == "prose of text.txt"
    capsys.readouterr()
    assert finetune.main([*more, "--learning-rate", "1"]) == 2
    assert "has other settings, data, device, versions or commit" in capsys.readouterr().err
    assert json.loads(path.read_text()) == second


def test_the_largest_batch_needs_a_gpu(arguments, tmp_path, capsys):
    assert finetune.main([*arguments, "--largest"]) == 2
    assert "--largest needs a CUDA device, got cpu" in capsys.readouterr().err


def test_tables_of_cost(arguments, tmp_path, model_folder):
    """Tokens per second and largest batches, by hand."""
    arguments[arguments.index("--out") + 1] = str(tmp_path / MEASUREMENTS)
    assert finetune.main([*arguments, "--methods", "full"]) == 0
    (path,) = (tmp_path / MEASUREMENTS).iterdir()
    record = json.loads(path.read_text())
    record["settings"]["model"] = "gemma3-270m.gguf"
    record["runs"][0]["ms_per_step"] = 4.0
    record["largest"] = [
        {"method": "cce", "sequences": 96, "tokens": 98304, "ms_per_step": 500.0, "peak_mib": 9.0},
        {"method": "liger", "sequences": 0, "tokens": 0, "stopped_by": "out of memory"},
    ]
    path.write_text(json.dumps(record))
    text = training_runs.section("finetune", training_runs.read(path.parent))
    assert text.startswith("### Gemma 3 270M, 2 sequences a step\n")
    assert "| 4.0 | 8,000 | 0 |" in text  # 2 sequences of 16 tokens
    assert "| `cce` | 96 | 98,304 | 500 | 196,608 | 9 | abc |" in text
    assert "`liger`" not in text


def parse(module, arguments):
    """The arguments of an experiment at its tiniest."""
    parser = module.build_parser()
    parser.set_defaults(**module.SMOKE)
    return parser.parse_args([*arguments, "--methods", "full"])


@pytest.fixture
def teacher(arguments, model_folder, tmp_path):
    """The command with a model whose logits are large and whose layers matter."""
    model, tokenizer = load_model(str(model_folder), torch.float32, CPU)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1 if value.ndim == 1 else 10)
    model.config.attention_dropout = 0.0  # which depends on the order of the sequences
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "teacher")
    return [*arguments[:-1], str(tmp_path / "teacher")]


@pytest.mark.parametrize("beta", ["0", "0.3"])
def test_distillation(teacher, tmp_path, beta):
    """The student begins as one of the two layers, and all methods lead it to the same loss."""
    pytest.importorskip("trl")
    methods = ["--methods", "full", "chunked", "trl", comparison.REORDERED]
    more = [*methods, "--beta", beta, "--steps", "6", "--learning-rate", "1e-2"]
    assert distill.main([*teacher, *more]) == 0
    path = tmp_path / f"distill_teacher-beta{beta}_cpu.json"
    record = json.loads(path.read_text())
    assert record["settings"]["student's layers"] == "1 of 2"
    assert record["settings"]["beta"] == float(beta)
    runs = {run["method"]: run for run in record["runs"]}
    full = runs["full"]
    assert full["losses"][-1] < full["losses"][0]
    assert 0 < full["judged"][-1]["held_out_loss"] < record["before"]["held_out_loss"]
    for run in runs.values():
        assert run["losses"] == pytest.approx(full["losses"], rel=0.02)
    assert runs["trl"]["losses"] != full["losses"]
    text = training_runs.section("distill", training_runs.read(path.parent))
    assert text.count("\n| `trl` | 1 |") == 1


def test_the_divergence_of_a_student_is_that_of_its_logits(teacher):
    made = distill.Distill(parse(distill, [*teacher, "--every", "2", "--beta", "0.3"]), CPU)
    student = made.make_model(0)
    p, q = (
        one(made.held_out, use_cache=False).logits[:, :-1].log_softmax(-1).double()
        for one in (student.eval(), made.teacher)
    )
    m = torch.log(0.7 * p.exp() + 0.3 * q.exp())
    expected = 0.3 * (q.exp() * (q - m)).sum(-1) + 0.7 * (p.exp() * (p - m)).sum(-1)
    found = made.measure(student, None)["held_out_loss"]  # its body computes in bfloat16
    assert found == pytest.approx(expected.mean().item(), rel=0.02)
    assert not any(each.requires_grad for each in made.teacher.parameters())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--beta", "1.5"], "--beta must be from 0 to 1, got 1.5"),
        (["--every", "3"], "--every must be from 1 to 2, got 3"),
        (["--methods", "cce_exact"], "impl"),
    ],
)
def test_no_such_distillation(arguments, option, message, capsys):
    assert distill.main([*arguments, *option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters(arguments, tmp_path, model_folder):
    """Runs start from the same adapters, whatever trained them before, and the held-out loss
    includes those of the output layer.
    """
    pytest.importorskip("peft")
    more = ["--lora", "2", "--lora-alpha", "64", "--lora-head", "--learning-rate", "1e-2"]
    methods = ["--methods", "full", "chunked", "full"]
    assert finetune.main([*arguments, *more, *methods, "--steps", "6"]) == 0
    record = json.loads((tmp_path / f"finetune_{model_folder.name}-lora-head_cpu.json").read_text())
    settings = record["settings"]
    assert [settings[name] for name in ("lora", "lora_alpha", "lora_head")] == [2, 64, True]
    first, chunked, again = record["runs"]
    assert again["losses"] == first["losses"]
    assert chunked["losses"] == pytest.approx(first["losses"], rel=0.02)
    assert chunked["losses"][-1] < chunked["losses"][0]

    made = finetune.Finetune(parse(finetune, [*arguments, *more]), CPU)
    model = made.make_model(0).eval()
    torch.nn.init.normal_(model.get_output_embeddings().lora_B.default.weight)
    logits = model(made.held_out, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.mT, made.held_out[:, 1:])
    found = made.measure(model, None)["held_out_loss"]
    assert found == pytest.approx(expected.item(), rel=0.01)
    without = F.linear(
        comparison.hidden_states(model, made.held_out)[:, :-1], model.get_output_embeddings().weight
    )
    assert abs(F.cross_entropy(without.mT, made.held_out[:, 1:]).item() - found) > 0.05 * found
