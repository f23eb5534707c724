"""GRPO and DPO with TRL's output layer and ours: the experiments' records, on a tiny model."""

import json

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from experiments import dpo, grpo
from experiments.trl_runs import METHODS, OURS, REORDERED, TRL, Sections, distances, output_layer
from tests.adapters.parity import assert_same, problem, step
from tests.transformers.models import llama
from tests.transformers.test_trainers import tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def check(path, sections, figure):
    """Check what every record has, and return its runs by method."""
    record = json.loads(path.read_text())
    runs = {run["method"]: run for run in record["runs"]}
    assert tuple(runs) == METHODS
    assert record["machine"]["versions"]["trl"]
    assert record["settings"]["steps"] == 2
    for run in runs.values():
        assert len(run["logs"]) == 2
        assert set(run["ms_per_step"]) == {*sections, "update"}
        assert min(run["ms_per_step"].values()) > 0
        assert run["peak_mib"] == {}  # on a CPU
    first, second = (entry[figure] for entry in runs[TRL]["logs"])
    assert first != pytest.approx(second, rel=1e-6), "nothing was trained"
    assert [line["method"] for line in record["distances"]] == [OURS, REORDERED]
    for line in record["distances"]:
        assert line["equal_steps"] == 2
        assert line["loss"] < 1e-5
        assert line[figure] < 1e-3
    return runs


def test_grpo(model, tmp_path):
    arguments = ["--model", model, "--steps", "2", "--batch-size", "16", "--tokens", "4"]
    path = grpo.main([*arguments, "--out", str(tmp_path)])
    assert path.name == "grpo_cpu.json"
    runs = check(path, {"generation", "log-probabilities"}, "grad_norm")
    # The log-probabilities of the policy that generated, and those of two steps on its completions.
    assert {method: run["calls"] for method, run in runs.items()} == {TRL: 0, OURS: 3, REORDERED: 0}
    assert "reward" in runs[TRL]["logs"][0]


def test_dpo(model, tmp_path, monkeypatch):
    words = lambda first: [f"w{first + i % 90} w{first + 3}" for i in range(16)]
    data = {"prompt": words(5), "chosen": words(20), "rejected": words(40)}
    monkeypatch.setattr(dpo, "preferences", lambda *_: data)
    path = dpo.main(
        ["--model", model, "--steps", "2", "--batch-size", "4", "--out", str(tmp_path),
         "--learning-rate", "1e-3"]
    )  # fmt: skip
    runs = check(path, {"reference"}, "rewards/margins")
    assert runs[OURS]["calls"] == 4  # policy and reference


def test_rejected_sums_are_wrong_and_chosen_ones_right():
    data = dpo.preferences(20, 4, seed=0)
    right = lambda line: eval(line.split("=")[0]) == int(line.split("=")[1])
    judged = {
        name: [[right(line) for line in text.splitlines()] for text in data[name]]
        for name in ("prompt", "chosen", "rejected")
    }
    assert all(map(all, judged["prompt"] + judged["chosen"]))
    wrong = sum(not all(lines) for lines in judged["rejected"])
    assert wrong > 10


def test_the_same_sums_in_another_order():
    hidden, weight, targets = problem(tokens=200, classes=3000, dim=64)
    options = (None, targets, 0.7, 1000, None, 1.0, ("entropy", "is_top1"))
    call = lambda function: lambda h, w: function.apply(h, w, *options)[:2]
    theirs = step(call(ChunkedLogProbFunction), hidden, weight)
    with output_layer(REORDERED) as adapter:
        assert adapter is None
        reordered = step(call(utils._ChunkedLogProbFunction), hidden, weight)
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert_same(reordered, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.equal(reordered[0][0], theirs[0][0]), "the order is the same"


def test_distances():
    logs = lambda *values: [{"loss": value, "other": 1.0} for value in values]
    runs = [
        {"method": TRL, "seed": 0, "logs": logs(2.0, 4.0, 3.0)},
        {"method": OURS, "seed": 0, "logs": logs(2.0, 4.0, 3.5)},
        {"method": REORDERED, "seed": 0, "logs": logs(2.001, 4.1, 3.0)},
        {"method": OURS, "seed": 1, "logs": logs(0.0)},  # TRL's was skipped
    ]
    ours, reordered = distances(runs, ("loss", "absent"))
    assert ours == {"method": OURS, "seed": 0, "loss": 0.5, "equal_steps": 2}
    assert reordered["loss"] == pytest.approx(0.1)
    assert reordered["equal_steps"] == 1
    for run in runs[:2]:
        del run["logs"][0]["loss"]  # logged in some steps only
    assert distances(runs[:2], ("loss",))[0]["equal_steps"] == 2


def test_sections_of_a_step(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr("experiments.trl_runs.time.perf_counter", lambda: next(clock))

    class Owner:
        def work(self):
            return 5

    owner, sections = Owner(), Sections(torch.device("cpu"))
    sections.watch(owner, "work", "some", when=lambda: counted)
    sections.on_step_begin()
    counted = False
    assert owner.work() == 5  # asks no clock
    counted = True
    assert owner.work() == 5
    sections.on_step_end()
    assert sections.means() == {"some": 2000.0, "update": 8000.0}
