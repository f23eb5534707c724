"""Kinds of post-training: log-probabilities and divergences of this package and of trainers."""

import dataclasses
import json
import sys

import pytest
import torch

from cut_cross_entropy.benchmark import token_methods
from cut_cross_entropy.benchmark.__main__ import chosen_methods, main, parse_arguments, tasks
from cut_cross_entropy.benchmark.data import make
from cut_cross_entropy.benchmark.kinds import Kind, parse
from cut_cross_entropy.benchmark.methods import DEFAULT, METHODS
from cut_cross_entropy.benchmark.questions import TEMPERATURE, ask, errors
from cut_cross_entropy.benchmark.runs import Task
from cut_cross_entropy.benchmark.shapes import Shape
from cut_cross_entropy.benchmark.worker import Worker

SHAPE = Shape("tiny", 300, 16)
LOGPROBS = {
    "chunked": token_methods.ours("chunked"),
    "trl": token_methods.trl,
    "liger": token_methods.liger,
}
DIVERGENCES = {
    "chunked": token_methods.our_divergence("chunked"),
    "trl": token_methods.trl_divergence,
}


def question(kind, ignored=False):
    """A question of a kind about 48 tokens, the first of which may be ignored."""
    problem = make("randn", 48, SHAPE, torch.float32)
    if ignored:
        problem.targets[:5] = -100
    for tensor in (problem.e, problem.c):
        tensor.requires_grad_()
    return ask(problem, parse(kind))


def compare(asked, build):
    """Errors of a method's scores and gradients against full logits."""
    full = token_methods.full_logits_divergence if asked.teacher else token_methods.full_logits
    scores, inputs = build(asked)(), [asked.problem.e, asked.problem.c]
    gradients = dict(zip("ec", asked.gradients(scores, inputs), strict=True))
    return errors(asked, scores, gradients, full)


@pytest.mark.parametrize(
    ("name", "kind", "products"),
    [
        ("loss-fw-bw", Kind("loss", "fw-bw"), 3),
        ("loss-bw", Kind("loss", "bw"), 2),
        ("logprobs-fw+rank+entropy", Kind("logprobs", "fw", frozenset({"rank", "entropy"})), 1),
        ("logprobs-fw-bw", Kind("logprobs", "fw-bw"), 3),
        ("divergence-fw-bw+jsd", Kind("divergence", "fw-bw", frozenset({"jsd"})), 4),
    ],
)
def test_names_of_kinds(name, kind, products):
    assert parse(name) == kind
    assert kind.products == products


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logprobs", "kind must be one of loss-fw, loss-bw"),
        ("loss-fw+entropy", "loss-fw may be followed by nothing"),
        ("logprobs-fw+jsd", "may be followed by +entropy, +temperature, +rank, +candidates"),
        ("logprobs-fw+rank+rank", "each once"),
        ("divergence-fw+jsd+reverse", "+reverse and +jsd exclude each other"),
    ],
)
def test_wrong_kinds_are_named(name, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--kinds", name])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", LOGPROBS)
@pytest.mark.parametrize("ignored", [False, True])
def test_log_probabilities_are_those_of_full_logits(method, ignored):
    found = compare(question("logprobs-fw-bw+entropy+temperature", ignored), LOGPROBS[method])
    assert set(found) == {
        *("error_logprobs", "error_entropy", "error_e", "error_c", "rounding_e", "rounding_c"),
        "loss_error",
    }
    assert max(found.values()) < 5e-5


def test_ranks_and_candidates_are_those_of_full_logits():
    found = compare(question("logprobs-fw-bw+rank+candidates", ignored=True), LOGPROBS["chunked"])
    assert {"error_rank", "error_candidates"} <= set(found)
    assert max(found.values()) < 5e-5


def test_of_ranks_trl_has_the_likeliest_class():
    asked = question("logprobs-fw-bw+rank")
    assert token_methods.trl(asked)()["rank"].dtype == torch.bool
    assert compare(asked, token_methods.trl)["error_rank"] == 0


@pytest.mark.parametrize("kind", ["divergence-fw-bw", "divergence-fw-bw+reverse+temperature",
                                  "divergence-fw-bw+jsd"])  # fmt: skip
@pytest.mark.parametrize("method", DIVERGENCES)
def test_divergences_are_those_of_full_logits(method, kind):
    asked = question(kind, ignored=True)
    found = compare(asked, DIVERGENCES[method])
    assert max(found.values()) < 5e-5
    assert asked.total(DIVERGENCES[method](asked)()) > 1e-3, "student and teacher are the same"


def test_the_mean_of_a_divergence_is_compared_too():
    asked = question("divergence-fw-bw+jsd", ignored=True)
    full = token_methods.full_logits_divergence
    mean = lambda: {"mean": full(asked)()["divergence"].sum() / 43}
    found = compare(asked, lambda _: mean)
    assert "error_divergence" not in found
    assert max(found.values()) < 1e-5
    off = compare(asked, lambda _: lambda: {"mean": 1.1 * mean()["mean"]})
    assert off["error_e"] == pytest.approx(0.1, rel=1e-3)
    assert off["loss_error"] == pytest.approx(0.1 * mean()["mean"].item(), rel=1e-3)


def test_the_mixture_of_a_divergence_may_underflow():
    asked = question("divergence-fw-bw+jsd")
    asked.problem.e.data.mul_(50)
    found = token_methods.full_logits_divergence(asked)()
    assert found["divergence"].isfinite().all()
    assert all(g.isfinite().all() for g in asked.gradients(found, [asked.problem.c]))


def test_errors_are_seen():
    asked = question("logprobs-fw-bw+entropy+rank+temperature")
    assert asked.temperature == TEMPERATURE

    def off(given):
        """A method that forgets the temperature."""
        return token_methods.full_logits(dataclasses.replace(given, temperature=1.0))

    found = compare(asked, off)
    assert found["error_logprobs"] > 0.1
    assert found["error_entropy"] > 0.1
    assert found["error_rank"] == 0  # it does not depend on the temperature
    assert min(found["error_e"], found["error_c"], found["loss_error"]) > 0.01

    def shifted(given):
        def run():
            scores = token_methods.full_logits(given)()
            return {**scores, "logprobs": scores["logprobs"] + 0.25, "rank": scores["rank"] + 1}

        return run

    found = compare(asked, shifted)
    assert found["error_logprobs"] == pytest.approx(0.25, abs=1e-5)
    assert found["error_rank"] == 1.0


def test_the_same_seed_asks_the_same():
    first, second = (question("logprobs-fw-bw+entropy+candidates") for _ in range(2))
    assert torch.equal(first.candidates, second.candidates)
    assert first.candidates.shape == (48, 64)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    teachers = [question("divergence-fw").teacher for _ in range(2)]
    assert torch.equal(teachers[0].c, teachers[1].c)
    off = (teachers[0].e - question("divergence-fw").problem.e.detach()).norm()
    assert off / teachers[0].e.norm() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (token_methods.trl, "logprobs-fw+candidates", "TRL does not have candidates"),
        (token_methods.liger, "logprobs-fw+rank+candidates", "Liger does not have ranks and cand"),
    ],
)
def test_what_a_method_lacks_is_refused_by_name(build, kind, message):
    with pytest.raises(NotImplementedError, match=message):
        build(question(kind))


def test_an_absent_package_is_named():
    with pytest.raises(ImportError, match="verl is not installed"):
        token_methods.verl(question("logprobs-fw"))


def test_the_kernel_of_verl_is_imported_without_the_rest_of_verl(tmp_path, monkeypatch):
    folder = tmp_path / "verl/utils/kernel"
    folder.mkdir(parents=True)
    for package in (folder.parent.parent, folder.parent, folder):
        (package / "__init__.py").write_text("raise ImportError('no Ray')\n")
    (folder / "linear_cross_entropy.py").write_text(
        "def linear_cross_entropy(hidden, weight, labels, temperature, reduction, group):\n"
        "    logits = hidden @ weight.T / temperature\n"
        "    logprobs = logits.log_softmax(-1)\n"
        "    chosen = logprobs.gather(-1, labels[:, None])[:, 0]\n"
        "    return chosen, -(logprobs.exp() * logprobs).sum(-1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = question("logprobs-fw-bw+entropy+temperature")
    try:
        assert max(compare(asked, token_methods.verl).values()) < 5e-5
        assert METHODS["verl"].build(asked.problem)().item() > 0
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
            del sys.modules[name]


def test_methods_that_fit_the_kinds_are_chosen(monkeypatch):
    monkeypatch.setattr("cut_cross_entropy.benchmark.__main__.installed", lambda name, peers: True)
    chosen = lambda *kinds: set(chosen_methods(parse_arguments(["--kinds", *kinds]), on_gpu=True))
    assert {"cce", "trl", "liger", "verl"} <= chosen("logprobs-fw+entropy")
    assert not {"apple", "quack", "torch"} & chosen("logprobs-fw+entropy")
    assert chosen("divergence-fw-bw") == {"gemm", "cce", "chunked", "baseline", "trl", "liger"}
    assert chosen("divergence-fw-bw", "loss-fw") == set(DEFAULT)


def test_a_method_starts_with_a_kind_that_it_has(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    worker = Worker("trl")
    task = Task("tiny", "structured", 16, SHAPE, dtype="float32")
    worker.load(**{**task.data(), "shape": dataclasses.asdict(SHAPE)})
    assert worker.first(["logprobs-fw", "logprobs-fw+candidates"])["first_ms"] > 0
    with pytest.raises(NotImplementedError, match="candidates"):
        worker.first(["logprobs-fw+candidates"])


def test_the_command_measures_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    kinds = ["logprobs-fw-bw+entropy+candidates", "divergence-fw+jsd"]
    arguments = ["--tokens", "16", "--classes", "96", "--repetitions", "1", "--kinds", *kinds]
    arguments += ["--methods", "chunked", "torch_compile", "--one-process"]
    main([*arguments, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["method"], row["kind"]) for row in rows] == [("chunked", kind) for kind in kinds]
    for row, products in zip(rows, (3, 2), strict=True):
        assert max(row["error_e"], row["error_c"]) < 1e-4
        flop = 2 * 16 * 96 * 256 * products
        assert row["tflops"] == pytest.approx(flop / row["runtime_ms"] / 1e9)
        assert row["gemms"] == pytest.approx(row["runtime_ms"] / row["gemm_ms"])
        assert row["op_mem_mb"] > 0
    assert max(rows[0]["error_logprobs"], rows[0]["error_entropy"]) < 1e-4
    out = capsys.readouterr().out
    assert "error_logprobs  error_entropy  error_candidates\n" in out
    assert "torch_compile, first: NotImplementedError: torch_compile does not have logprobs" in out


def test_tasks_carry_the_kinds():
    (task,) = tasks(parse_arguments(["--kinds", "logprobs-fw", "--data", "ministral-8b"]), True)
    assert task.kinds == ["logprobs-fw"]
    assert (task.shape.num_classes, task.shape.dim) == (131072, 4096)
