"""Full logits and ``linear_cross_entropy`` are the same loss; the demo shows it."""

import copy
import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from cut_cross_entropy.benchmark.measure import peak_mib
from cut_cross_entropy.transformers import CutCrossEntropyWarning, is_patched
from tests.support import forget_warnings
from tests.training.conftest import load, plain_steps
from training import demo
from training.checkpoint import list_checkpoints
from training.losses import CutLogits, FullLogits, IdlePatchError
from training.train import main, set_up

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def every_warning_anew():
    """Warnings of the patch are given once per process; each test is to see its own."""
    forget_warnings()
    yield
    forget_warnings()


def one_step(model, loss, batch):
    model.zero_grad()
    loss.prepare(model)
    value = loss(model, batch)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_same_loss_and_gradients(config, impl):
    model, batches = load(config)
    assert_same_step(model.eval(), impl, batches[0, :4])  # dropout would draw twice


def assert_same_step(model, impl, batch):
    full, full_grads = one_step(model, FullLogits(), batch)
    cut, cut_grads = one_step(model, CutLogits(impl), batch)
    torch.testing.assert_close(cut, full, rtol=1e-6, atol=1e-6)
    for name, grad in full_grads.items():
        torch.testing.assert_close(cut_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_training_curves_agree(config):
    curves = []
    for loss in ("full", "chunked"):
        changed = dataclasses.replace(config, loss=loss)
        curves.append([float(value) for value in plain_steps(changed, *load(changed))])
    assert len(curves[0]) == 10
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert curves[0][-1] < curves[0][0]


# What a family does to its logits: its option, a value that shows in the loss, one that does not.
FAMILIES = {
    "Gemma2": ("final_logit_softcapping", 0.5, None),
    "Cohere": ("logit_scale", 0.1, 1.0),
    "Granite": ("logits_scaling", 8.0, 1.0),
}


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    """A tiny model that changes its logits, and one with the same weights that does not."""
    option, value, neutral = FAMILIES[request.param]
    models = [tiny_model(request.param, **{option: v}) for v in (value, neutral)]
    models[1].load_state_dict(models[0].state_dict())
    return models


def tiny_model(family, **options):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        attn_implementation="eager",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_softcap_and_scales_of_a_family(family, config, impl):
    batch = load(config)[1][0, :4]
    changed, unchanged = (one_step(model, CutLogits(impl), batch)[0] for model in family)
    assert abs(changed - unchanged) > 0.01
    assert_same_step(family[0], impl, batch)


def test_training_curves_of_a_family_agree(family, config):
    _, batches = load(config)
    curves = []
    for loss in (FullLogits(), CutLogits("chunked")):
        steps = plain_steps(config, copy.deepcopy(family[0]), batches, loss)
        curves.append([float(value) for value in steps])
    assert len(curves[0]) == 10
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert curves[0][-1] < curves[0][0]


def test_a_model_is_patched_for_the_loss_that_asks_for_it(config):
    model, batches = load(config)
    next(plain_steps(config, model, batches))
    assert is_patched(model)
    # The demo trains one model with one loss after the other.
    next(plain_steps(config, model, batches, FullLogits()))
    assert not is_patched(model)
    assert type(model) is transformers.LlamaForCausalLM


def test_patched_run_leaves_what_a_plain_model_does(config, arguments, tmp_path):
    assert main([*arguments, "--steps", "2"]) == 0
    folder = tmp_path / "run/checkpoints/checkpoint-2"
    plain = dataclasses.replace(config, model=str(folder), loss="full")
    plain = dataclasses.replace(plain, output=str(tmp_path / "none"))
    trainer = set_up(plain).trainer
    assert type(trainer.model) is transformers.LlamaForCausalLM

    # The export of a patched model is that of a plain one.
    trainer.save_model(str(tmp_path / "plain"))
    (tmp_path / "plain/training_args.bin").unlink()
    for folder in (tmp_path / "run/model", tmp_path / "plain"):
        config_file = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config_file["architectures"] == ["LlamaForCausalLM"]
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "run/model").iterdir())
    for name in files:
        assert (tmp_path / "run/model" / name).read_bytes() == (
            tmp_path / "plain" / name
        ).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert type(loaded) is transformers.LlamaForCausalLM


class TestIdlePatch:
    """A loss from full logits does not pass for one without."""

    @pytest.fixture
    def with_idle_patch(self, monkeypatch):
        """Models of this test have a head that needs its logits."""

        def prepare(loss, model):
            prepare_model(loss, model)
            model.get_output_embeddings().register_full_backward_hook(lambda *_: None)

        prepare_model = CutLogits.prepare
        monkeypatch.setattr(CutLogits, "prepare", prepare)

    @pytest.mark.usefixtures("with_idle_patch")
    def test_stops_before_the_first_update(self, config):
        model, batches = load(config)
        before = copy.deepcopy(model.state_dict())
        with (
            pytest.warns(CutCrossEntropyWarning, match="backward hooks"),
            pytest.raises(
                IdlePatchError, match=r"loss='chunked' .* LlamaForCausalLM did nothing .*'full'"
            ),
        ):
            next(plain_steps(config, model, batches))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.usefixtures("with_idle_patch")
    @pytest.mark.filterwarnings("ignore::cut_cross_entropy.transformers.CutCrossEntropyWarning")
    def test_ends_the_scripts(self, arguments, tmp_path, capsys):
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith("train.py: error: loss='chunked' was asked for")
        assert not list_checkpoints(tmp_path / "run/checkpoints")
        assert demo.main(demo_arguments(arguments, tmp_path)) == 2
        assert "demo.py: error: loss='chunked' was asked for" in capsys.readouterr().err

    def test_patch_that_is_gone(self, config):
        model, batches = load(config)
        steps = plain_steps(config, model, batches)
        next(steps)
        FullLogits().prepare(model)
        with pytest.raises(IdlePatchError, match="LlamaForCausalLM is not there"):
            next(steps)


def test_peak_is_what_the_work_held():
    def work():
        first = torch.ones(2**20)  # 4 MiB
        second = first + 1  # 8 MiB held
        del first
        return second.sum()

    assert peak_mib(lambda _: work(), CPU) == pytest.approx(8, rel=0.01)


def demo_arguments(arguments, tmp_path):
    """The arguments of the training script that the demo has too."""
    drop = {"--warmup-steps", "--checkpoint-interval"}
    shared = [word for word in arguments if word != "--no-tensorboard"]
    pairs = zip(shared[::2], shared[1::2], strict=True)
    return [word for flag, value in pairs if flag not in drop for word in (flag, value)]


def test_demo(arguments, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert demo.main([*demo_arguments(arguments, tmp_path), "--steps", "4"]) == 0
    printed = capsys.readouterr().out
    assert "Largest difference of all 4 steps" in printed
    verdict = r"PASSED: same losses, by \S+ nats at most over 4 steps \(allowed: 0.001\); "
    verdict += r"peak of the loss, 992 tokens: \d+ instead of \d+ MiB"
    assert re.fullmatch(verdict, printed.splitlines()[-1])
    # The larger batch first, and why the smaller one may need more without logits.
    large, small = (printed.index(f"peak of the loss, {n} tokens") for n in ("992", "128"))
    assert large < small < printed.index("| loss of step 1 ")
    assert "may exceed the logits of a batch as small as 128 tokens" in printed
    output = tmp_path / "run"
    assert (output / "summary.md").read_text(encoding="utf-8").strip() in printed
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    with (output / "losses.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        assert float(row["full"]) == pytest.approx(float(row["chunked"]), abs=1e-3)


def test_demo_fails_when_the_losses_differ(arguments, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "TOLERANCE", -1.0)
    assert demo.main([*demo_arguments(arguments, tmp_path), "--steps", "1"]) == 1
    assert "FAILED: the losses differ, by" in capsys.readouterr().out.splitlines()[-1]


def test_demo_names_bad_input(arguments, tmp_path, capsys):
    assert demo.main([*demo_arguments(arguments, tmp_path), "--loss", "full"]) == 2
    assert "--loss must be an implementation" in capsys.readouterr().err
    assert demo.main([*demo_arguments(arguments, tmp_path), "--windows", "0"]) == 2
    assert "--windows must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "rows"), [(1, 0), (6, 2)], ids=["first run", "second run"])
def test_ctrl_c_keeps_the_steps_done(arguments, tmp_path, capsys, monkeypatch, steps, rows):
    pytest.importorskip("matplotlib")
    done = []

    def until(*given, before=FullLogits.__call__):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(None)
        return before(*given)

    monkeypatch.setattr(FullLogits, "__call__", until)
    assert demo.main([*demo_arguments(arguments, tmp_path), "--steps", "4"]) == 130
    output = tmp_path / "run"
    summary = (output / "summary.md").read_text(encoding="utf-8")
    assert f"Interrupted: {min(steps, 4)} of 4 steps with full logits, {rows} without" in summary
    assert summary.strip() in capsys.readouterr().out
    with (output / "losses.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == min(steps, 4)
    assert [row["chunked"] != "" for row in table] == [i < rows for i in range(len(table))]
    assert (output / "demo.png").exists() == (rows > 0)


def test_demo_refuses_conversations(arguments, model_folder, tmp_path, capsys):
    """It learns every token of its data."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    )
    folder, path = tmp_path / "chat", tmp_path / "chat.jsonl"
    transformers.AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chat = [{"role": role, "content": "Ten times ten."} for role in ("user", "assistant")]
    path.write_text(json.dumps({"messages": chat}))
    words = ["--model", str(folder), "--data", str(path)]
    assert demo.main([*demo_arguments(arguments, tmp_path), *words]) == 2
    message = f"demo.py: error: --data {str(path)!r} holds conversations, not text\n"
    assert capsys.readouterr().err == message


def test_ctrl_c_before_there_is_a_result(arguments, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_model", stop)
    assert demo.main(demo_arguments(arguments, tmp_path)) == 130
    assert "interrupted before there was a result" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_threads_of_the_demo_wait_without_computing():
    """OpenMP reads the variable when PyTorch is loaded, which fails here."""
    program = (
        "import contextlib, os, sys; sys.modules['torch'] = None\n"
        "with contextlib.suppress(ImportError): import training.demo\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "PASSIVE\n", done.stderr
