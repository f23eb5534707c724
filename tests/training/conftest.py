"""A tiny model with its tokenizer and a text, made here: nothing comes from outside."""

from pathlib import Path

import pytest
import torch

from training.config import TrainConfig

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and dropout, and a tokenizer with one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    config = transformers.LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        # Draws random numbers in every step: a resume that forgets the generator shows.
        attention_dropout=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for 62 windows of 16 tokens: ten steps of 8 cross an epoch."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(("All work and no play makes a dull test. " * 25), encoding="utf-8")
    return path


@pytest.fixture
def config(model_folder: Path, text_file: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model_folder),
        data=str(text_file),
        loss="chunked",
        steps=10,
        batch_size=8,
        sequence_length=16,
        learning_rate=1e-2,
        warmup_steps=3,
        device="cpu",
        log_interval=1,
        checkpoint_interval=4,
    )


@pytest.fixture
def arguments(model_folder: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """The settings of ``config`` as a command line that writes to ``tmp_path``."""
    return (
        f"--model {model_folder} --data {text_file} --loss chunked --steps 10 --batch-size 8 "
        "--sequence-length 16 --learning-rate 1e-2 --warmup-steps 3 --device cpu --log-interval 1 "
        f"--checkpoint-interval 4 --output {tmp_path}/run"
    ).split()
