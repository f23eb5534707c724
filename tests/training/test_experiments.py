"""The experiments run, compare like with like, and their page is what their records say."""

import json
import math
import shutil

import pytest
import torch

from docs import make, training_runs
from experiments import comparison, corpus, finetune, pretrain
from experiments.comparison import MEASUREMENTS, REORDERED, cut_windows, token_losses, train
from training.loop import Schedule, draw_batches
from training.models import load_model

CPU = torch.device("cpu")
SCHEDULE = Schedule(learning_rate=1e-2, warmup_steps=2, final=0.1, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Packages with sources, docstrings, a duplicate, a table and a file that is no text."""
    root = tmp_path_factory.mktemp("packages")
    for i in range(150):
        folder = root / f"part{i}"
        folder.mkdir()
        words = " ".join(f"word{(i * j) % 97}" for j in range(120))
        (folder / "module.py").write_text(
            f'"""Package {i}.\n\n    {words}\n"""\nx = {i}\n', encoding="utf-8"
        )
    shutil.copy(root / "part0/module.py", root / "part1/same.py")
    (root / "part2/table.txt").write_bytes(b"1 " * corpus.LARGEST_FILE)
    (root / "part3/latin.py").write_bytes(b"# \xe9\xff")
    return [root]


class TestCorpus:
    def test_folders_are_held_out_whole_and_nothing_comes_twice(self, roots):
        split = corpus.sources(roots, 30_000, held_out_share=0.2)
        train, held_out = split
        assert train
        assert held_out
        texts = train + held_out
        assert len(set(texts)) == len(texts)
        assert not any("1 1 1" in text for text in texts)
        assert sum(map(len, train)) >= 30_000
        again = corpus.sources(roots, 30_000, held_out_share=0.2)
        assert again == split

    def test_docstrings_are_cleaned(self, roots):
        texts = corpus.docstrings(roots, 10**9)
        assert any(text.startswith("Package 7.\n\nword") for text in texts)
        assert not any("x = " in text for text in texts if text.startswith("Package"))

    def test_no_text(self, tmp_path):
        with pytest.raises(ValueError, match=r"roots hold no text for train, got \["):
            corpus.sources([tmp_path], 100)


def test_batches_show_every_window_before_any_comes_again():
    windows = cut_windows(torch.arange(103), 10)
    assert windows.shape == (10, 10)
    batches = draw_batches(windows, steps=4, batch_size=5, seed=1)
    assert batches.shape == (4, 5, 10)
    for epoch in batches.view(2, -1):
        assert epoch.sort().values.tolist() == list(range(100))
    assert not torch.equal(batches, draw_batches(windows, 4, 5, seed=2))


def test_rate_rises_and_falls():
    rates = [SCHEDULE.rate(step, 10) for step in range(11)]
    assert rates[:2] == [5e-3, 1e-2]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[10] == pytest.approx(1e-3)


def test_judge_measures_every_token_by_full_logits(model_folder, monkeypatch):
    monkeypatch.setattr(comparison, "JUDGED_TOKENS", 30)  # two windows at a time
    model, _ = load_model(str(model_folder), torch.float32, CPU)
    windows = torch.randint(256, (5, 12), generator=torch.Generator().manual_seed(0))
    classes = torch.arange(256) < 40
    losses, mass = token_losses(model, windows, classes, autocast=False)
    with torch.no_grad():
        logits = model.eval()(windows).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), windows[:, 1:], reduction="none"
    )
    torch.testing.assert_close(losses, expected)
    assert mass == pytest.approx(float(logits.softmax(-1)[..., :40].sum(-1).mean()))


class Measured:
    """As much of an experiment as a run asks for."""

    def measure(self, model, batches):
        return {"asked": True}


def test_methods_see_the_same_and_the_yardstick_is_close(model_folder):
    windows = cut_windows(torch.arange(600) % 256, 20)
    batches = draw_batches(windows, 6, 4, seed=0)
    results = {}
    for method in ("full", "chunked", REORDERED):
        model, _ = load_model(str(model_folder), torch.float32, CPU)
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        loss = comparison.loss_of(method, CPU)
        results[method] = train(
            Measured(), model, method, loss, batches, SCHEDULE, 4, autocast=False
        )
    full = results["full"]["losses"]
    assert len(full) == 6
    assert [said["step"] for said in results["full"]["judged"]] == [4, 6]
    assert full[-1] < full[0]
    for method in ("chunked", REORDERED):
        assert results[method]["losses"] == pytest.approx(full, abs=1e-4)


def test_rarity_groups():
    losses = torch.arange(8.0)
    seen = torch.tensor([0, 0, 5, 9, 10, 99, 100, 5000])
    found = pretrain.by_rarity(losses, seen)
    sizes = {bucket["from"]: (bucket["targets"], bucket["loss"]) for bucket in found["buckets"]}
    assert sizes == {0: (2, 0.5), 1: (2, 2.5), 10: (2, 4.5), 100: (1, 6.0), 1000: (1, 7.0)}
    assert found["rarest_tenth"] == {"at_most": 0, "targets": 2, "loss": 0.5}


def test_no_run_starts_that_would_end_after_the_time_limit(
    roots, model_folder, tmp_path, monkeypatch
):
    """Runs take 40 seconds each here, of 100; what is there is on the disk after each."""
    now, seen = [0.0], []
    path = tmp_path / "new" / f"finetune_{model_folder.name}_cpu.json"

    def train(*_, **__):
        seen.append(len(json.loads(path.read_text())["runs"]) if path.exists() else None)
        now[0] += 40
        return {"judged": [{}], "ms_per_step": 1.0}

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(comparison.time, "monotonic", lambda: now[0])
    arguments = ["--smoke", "--device", "cpu", "--commit", "abc"]
    arguments += ["--out", str(path.parent), "--roots", str(roots[0]), "--megabytes", "0.02"]
    arguments += ["--model", str(model_folder), "--held-out", "2", "--time-limit", "100"]
    assert finetune.main(arguments) == 0
    content = json.loads(path.read_text())
    assert seen == [None, 1]
    assert content["machine"]["commit"] == "abc"
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert [run["method"] for run in content["runs"]] == ["full", "chunked"]
    late = {"method": REORDERED, "seed": 0, "reason": "time limit of 100 s"}
    assert content["skipped"] == [late]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_a_run_takes_is_known_from_the_last_of_its_method(
    roots, model_folder, tmp_path, monkeypatch
):
    """The first runs take 50 seconds here, since they compile, and the others 10, of 160."""
    now = [0.0]

    def train(*_, **__):
        now[0] += 50 if now[0] < 100 else 10
        return {"judged": [{}], "ms_per_step": 1.0}

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(comparison.time, "monotonic", lambda: now[0])
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--roots", str(roots[0])]
    arguments += ["--megabytes", "0.02", "--model", str(model_folder), "--held-out", "2"]
    arguments += ["--methods", "full", "chunked", "--seeds", "5", "--time-limit", "160"]
    assert finetune.main(arguments) == 0
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert [run["seed"] for run in content["runs"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [run["seed"] for run in content["skipped"]] == [4, 4]


@pytest.fixture(scope="module")
def site(tmp_path_factory, roots, model_folder):
    """A folder with the records of both experiments, at their tiniest."""
    root = tmp_path_factory.mktemp("site")
    out = str(root / MEASUREMENTS)
    common = ["--smoke", "--out", out, "--roots", str(roots[0]), "--device", "cpu"]
    tiny = ["--megabytes", "0.02", "--held-out", "2"]
    assert finetune.main([*common, *tiny, "--model", str(model_folder), "--seeds", "2"]) == 0
    assert pretrain.main([*common, *tiny, "--vocabulary", "400"]) == 0
    return root


@pytest.fixture(scope="module")
def finetuned(model_folder):
    """The name of the record of fine-tuning."""
    return f"finetune_{model_folder.name}_cpu"


def test_records_hold_the_runs(site, finetuned):
    found = json.loads((site / MEASUREMENTS / f"{finetuned}.json").read_text())
    runs = {(run["method"], run["seed"]): run for run in found["runs"]}
    assert len(runs) == 6
    for seed in (0, 1):
        full, chunked = (runs[method, seed]["losses"] for method in ("full", "chunked"))
        assert len(full) == found["settings"]["steps"] == 3
        assert chunked == pytest.approx(full, abs=0.05)
    assert runs["full", 0]["losses"] != runs["full", 1]["losses"]
    found = json.loads((site / MEASUREMENTS / "pretrain_cpu.json").read_text())
    vocabulary = found["settings"]["vocabulary"]
    assert 257 < vocabulary <= 400  # as many as the text has merges for
    for run in found["runs"]:
        last = run["judged"][-1]
        assert last["held_out_loss"] == pytest.approx(math.log(vocabulary), abs=0.5)
        assert 0 < last["unseen_mass"] < 1
        targets = sum(bucket["targets"] for bucket in last["buckets"])
        assert targets == found["data"]["held_out_tokens"] * 15 / 16


def test_tables_and_plots_of_new_records(site, finetuned, tmp_path):
    pytest.importorskip("matplotlib")
    records = training_runs.read(site / MEASUREMENTS)
    sections = [training_runs.section(name, records) for name in ("finetune", "pretrain")]
    assert [text.count("\n| `chunked` |") for text in sections] == [1, 1]
    assert sections[0].count("| `full` | 2 |") == 1
    found = training_runs.plots_of(records)
    assert [p.name for p in found] == [finetuned, "pretrain_cpu", "pretrain_cpu_rare"]
    for plot in found:
        assert f"(images/{plot.name}.png)" in "".join(sections)
        assert not plot.is_current(tmp_path)
        assert plot.save(tmp_path).read_bytes().startswith(b"\x89PNG")
        assert plot.is_current(tmp_path)


def test_a_broken_record_is_named(tmp_path, capsys):
    folder = tmp_path / MEASUREMENTS
    folder.mkdir(parents=True)
    (folder / "finetune_x.json").write_text("{")
    assert make.main(["--root", str(tmp_path)]) == 2
    assert "finetune_x.json is not a record of an experiment" in capsys.readouterr().err
    run = {"method": "cce", "seed": 0, "judged": [{"held_out_loss": 1.0}]}
    (folder / "finetune_x.json").write_text(json.dumps({"runs": [run]}))
    assert make.main(["--root", str(tmp_path)]) == 2
    assert "no run with full logits" in capsys.readouterr().err


@pytest.mark.parametrize("module", [finetune, pretrain])
def test_every_argument_has_help(module):
    for action in module.build_parser()._actions:
        assert action.help, action.option_strings


def test_wrong_input_is_named(roots, tmp_path, capsys):
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert pretrain.main([*arguments, "--roots", str(tmp_path)]) == 2
    assert "pretrain: error: roots hold no text" in capsys.readouterr().err
    missing = ["--model", "missing.gguf", "--roots", str(roots[0])]
    assert finetune.main([*arguments, *missing]) == 2
    assert "finetune: error: --model 'missing.gguf'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
