"""Random programs between a head and its loss: the patched model is equal, or says what it does."""

import pytest
import torch

from tests.transformers.chain_expressions import EXACT, HALF
from tests.transformers.chain_programs import Program, draw
from tests.transformers.chains import FAULTS, judge, minimise

SEED, PROGRAMS, BATCHES = 20, 300, 10


@pytest.mark.parametrize("batch", range(BATCHES))
def test_the_patched_model_is_equal_or_says_what_it_does(batch):
    kinds = []
    for index in range(batch, PROGRAMS, BATCHES):
        program = draw(SEED, index)
        verdict = judge(program)
        kinds.append(verdict.kind)
        if verdict.is_fault:
            program, verdict = minimise(program, verdict)
            pytest.fail(f"{verdict.kind}: {verdict.reason}\n{program}", pytrace=False)
    assert kinds.count("equal") >= 5, "a sample in which all fall back proves little"
    assert kinds.count("invalid") <= 6


def program_of(*statements, **settings):
    """A program without chance."""
    usual = {
        "batch": 2,
        "time": 4,
        "classes": 11,
        "dtype": torch.float64,
        "head": "linear",
        "tied": False,
        "frozen": (),
        "training": True,
        "labels": "some",
        "items": "int",
        "grad": "on",
        "autocast": False,
        "backward": "plain",
        "calls": 1,
    }
    head, output = "x = self.lm_head(h)", "return loss, x, logs"
    return Program(usual | settings, head, [*statements], output, EXACT, "by hand")


LOSS = "losses.append(F.cross_entropy(x.flatten(0, 1), y.flatten()))"


def test_a_plain_program_is_equal_without_full_logits():
    verdict = judge(program_of("x = x * self.scale", LOSS))
    assert (verdict.kind, verdict.reason) == ("equal", "")


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        # What only one of the two models does is a difference, in each thing that is compared.
        ("x = x * (2 if is_patched(self) else 1)", "different"),
        ("if is_patched(self):\n    x = x.detach() + x * 0", "different"),
        ("if is_patched(self):\n    losses.append(0 * self.class_bias.sum())", "different"),
        ("logs['a'] = is_patched(self)", "different"),
        ("if is_patched(self):\n    logs['a'] = 1", "different"),
        ("if is_patched(self):\n    raise ValueError", "crash"),
        ("if is_patched(self):\n    raise RuntimeError('cce_unpatch')", "crash"),
        ("if is_patched(self):\n    F.linear(h, self.lm_head.weight.flip(0).flip(0))", "equal"),
        ("raise ValueError", "invalid"),
    ],
)
def test_faults_are_seen(statement, kind):
    verdict = judge(program_of(statement, LOSS))
    assert verdict.kind == kind
    assert verdict.is_fault == (kind in FAULTS)


def checkpointed(reentrant):
    loss = "F.cross_entropy(x.flatten(0, 1), y.flatten())"
    return (
        f"def part(x, y):\n    return {loss}\n"
        f"losses.append(checkpoint(part, x, y, use_reentrant={reentrant}))"
    )


@pytest.mark.parametrize(
    ("statements", "settings"),
    [
        ([checkpointed(True)], {"backward": "twice"}),
        ([checkpointed(True)], {"tied": True}),
        ([checkpointed(False)], {"backward": "twice"}),
        (["losses.append(FusedCrossEntropy.apply(x, y))"], {"tied": True}),
        (["x = x * self.class_scale", "logs['sum'] = x.sum()", LOSS], {"autocast": True}),
        (["x = x.float() + self.second(h)", "logs['max'] = x.max()", LOSS], {"autocast": True}),
        (["x = x.to(torch.float64)", LOSS], {"autocast": True}),
        (["x = torch.tanh(x)", "x = x.clone()", "x[0] *= 2", LOSS], {}),
        (["before = x[0]", "x.mul_(2)", LOSS], {"grad": "inference"}),
    ],
)
def test_what_the_generator_found(statements, settings):
    if settings.get("autocast"):
        settings = settings | {"dtype": torch.float32}
    program = program_of(*statements, **settings)
    if settings.get("autocast"):
        program.tolerance = HALF
    verdict = judge(program)
    assert verdict.kind in ("equal", "fallback"), f"{verdict}\n{program}"


def test_a_program_is_the_same_each_time_and_can_be_made_smaller():
    assert str(draw(4, 7)) == str(draw(4, 7)) != str(draw(4, 8))
    program = program_of(
        "x = x * 2", "if is_patched(self):\n    x = x * 3\n    y = y", LOSS, training=False
    )
    smaller, verdict = minimise(program, judge(program))
    assert verdict.kind == "different"
    assert smaller.statements == ["if is_patched(self):\n    x = x * 3", LOSS]
    assert smaller.settings["training"]
