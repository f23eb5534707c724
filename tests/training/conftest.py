"""A tiny model with its tokenizer and a text, made here: nothing comes from outside."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.config import DTYPES, TrainConfig
from training.loop import Schedule, draw_batches, train_steps
from training.losses import FullLogits, make_loss
from training.models import load_model, vocabulary_size
from training.rows import load_windows

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


def copy_model(folder: Path, parent: Path, **settings: Any) -> Path:
    """Return a copy of a model's folder with other settings."""
    copied = Path(shutil.copytree(folder, parent / "copied"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **settings}))
    return copied


def load(config: TrainConfig) -> tuple[Any, torch.Tensor]:
    """The model of a configuration on the CPU, and its batches in the plain loop, (S, B, T)."""
    model, tokenizer = load_model(config.model, DTYPES[config.dtype], torch.device("cpu"))
    windows = load_windows(config, tokenizer, vocabulary_size(model))
    return model, draw_batches(windows, config.steps, config.batch_size, config.seed)


def plain_steps(
    config: TrainConfig, model: Any, batches: torch.Tensor, loss: FullLogits | None = None
) -> Iterator[torch.Tensor]:
    """The plain loop of the demo and the experiments; yields the loss of each step."""
    torch.manual_seed(config.seed)
    loss = loss or make_loss(config.loss, torch.device("cpu"))
    schedule = Schedule(config.learning_rate, config.warmup_steps)
    return train_steps(model, loss, batches, schedule, config.dtype == "autocast")


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
        tensorboard=False,
    )


@pytest.fixture
def arguments(model_folder: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """The settings of ``config`` as a command line that writes to ``tmp_path``."""
    return (
        f"--model {model_folder} --data {text_file} --loss chunked --steps 10 --batch-size 8 "
        "--sequence-length 16 --learning-rate 1e-2 --warmup-steps 3 --device cpu --log-interval 1 "
        f"--checkpoint-interval 4 --no-tensorboard --output {tmp_path}/run"
    ).split()


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights as a GGUF file; its linear layers are quantized."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    dim, hidden, vocabulary = 32, 64, 96
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(dim // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(chr, range(33, 126)), "ab", "<s>", "</s>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 94 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(94)
    writer.add_eos_token_id(95)

    generator = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocabulary, dim),
        "blk.0.attn_q": (dim, dim),
        "blk.0.attn_k": (dim // 2, dim),
        "blk.0.attn_v": (dim // 2, dim),
        "blk.0.attn_output": (dim, dim),
        "blk.0.ffn_gate": (hidden, dim),
        "blk.0.ffn_up": (hidden, dim),
        "blk.0.ffn_down": (dim, hidden),
    }
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        weight = 0.1 * generator.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(dim, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
