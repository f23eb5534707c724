"""Full logits and ``linear_cross_entropy`` are the same loss; the demo shows it."""

import csv
import dataclasses

import pytest
import torch

from training import demo
from training.losses import CutLogits, FullLogits, hidden_states
from training.memory import peak_bytes
from training.train import set_up

CPU = torch.device("cpu")


def one_step(model, loss, batch):
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_same_loss_and_gradients(config, tmp_path, impl):
    trainer, _ = set_up(config, tmp_path, None)
    model = trainer.model.eval()  # dropout would draw twice
    batch = trainer.windows.batch(0, 4)
    full, full_grads = one_step(model, FullLogits(), batch)
    cut, cut_grads = one_step(model, CutLogits(impl, 2**16), batch)
    torch.testing.assert_close(cut, full, rtol=1e-6, atol=1e-6)
    for name, grad in full_grads.items():
        torch.testing.assert_close(cut_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_training_curves_agree(config, tmp_path):
    curves = []
    for loss in ("full", "chunked"):
        trainer, _ = set_up(dataclasses.replace(config, loss=loss), tmp_path, None)
        curves.append([trainer.train_step()["loss"] for _ in range(10)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert curves[0][-1] < curves[0][0]


def test_softcap_and_scale_of_a_family(config, tmp_path):
    trainer, _ = set_up(config, tmp_path, None)
    model, batch = trainer.model.eval(), trainer.windows.batch(0, 4)
    hidden = hidden_states(model, batch)
    loss = CutLogits("reference", 2**20)
    plain = loss.head(model, hidden, batch)
    model.config.final_logit_softcapping = 0.1
    assert loss.head(model, hidden, batch) != plain
    model.config.logit_scale = 0.5
    with pytest.raises(NotImplementedError, match=r"scales its logits \(logit_scale\)"):
        loss(model, batch)


def test_peak_is_what_the_work_held():
    def work():
        first = torch.ones(2**20)  # 4 MiB
        second = first + 1  # 8 MiB held
        del first
        return second.sum()

    assert peak_bytes(work, CPU) == pytest.approx(8 * 2**20, rel=0.01)
    with pytest.raises(NotImplementedError, match="measured on cuda, cpu, got meta"):
        peak_bytes(work, torch.device("meta"))


def demo_arguments(arguments, tmp_path):
    """The arguments of the training script that the demo has too."""
    drop = {"--warmup-steps", "--checkpoint-interval"}
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [word for flag, value in pairs if flag not in drop for word in (flag, value)]


def test_demo(arguments, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert demo.main([*demo_arguments(arguments, tmp_path), "--steps", "4"]) == 0
    printed = capsys.readouterr().out
    assert "Largest difference of all 4 steps" in printed
    assert "peak of the loss, 128 tokens" in printed
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
    assert "FAILED" in capsys.readouterr().err


def test_demo_names_bad_input(arguments, tmp_path, capsys):
    assert demo.main([*demo_arguments(arguments, tmp_path), "--loss", "full"]) == 2
    assert "loss must be an implementation" in capsys.readouterr().err
    assert demo.main([*demo_arguments(arguments, tmp_path), "--windows", "0"]) == 2
    assert "windows must be at least 1, got 0" in capsys.readouterr().err
