"""The example of GRPO on a tiny model: the same rewards and losses with the adapter and without."""

import pytest

from examples import grpo
from tests.transformers.models import llama
from tests.transformers.test_trainers import tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_rewards_and_losses_are_the_same_with_the_adapter(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--steps", "2", "--output", str(tmp_path)]
    plain = grpo.main([*arguments, "--plain"])
    assert "TRL's output layer" in capsys.readouterr().out
    ours = grpo.main(arguments)
    # The log-probabilities of the old policy, and those of two steps on its completions.
    assert "token_logprobs: 3 calls" in capsys.readouterr().out
    assert len(plain) == 2
    assert plain[0]["loss"] != pytest.approx(plain[1]["loss"], rel=1e-4)
    assert plain[0]["reward_std"] > 0
    for mine, other in zip(ours, plain, strict=True):
        times = {name for name in other if "time" in name}
        assert {k: v for k, v in mine.items() if k not in times} == pytest.approx(
            {k: v for k, v in other.items() if k not in times}, rel=1e-4, abs=1e-6
        )


def test_the_reward():
    found = grpo.reward([" 12\n", "13", "none", " 11 or 12"], total=[12] * 4)
    assert found == [1.0, 0.5, -1.0, 0.5]
