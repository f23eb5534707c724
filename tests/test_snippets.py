"""The usage snippets run as they are printed, with their placeholders bound.

Those of the published package's description are written out here. Those of our own README and docs
are read from the files: every block fenced as ``python`` runs, in a fresh namespace. A block that
is not meant to run is fenced otherwise (``text``, ``bash``). A block that uses transformers runs
in a process of its own, since it may patch the library; without transformers it fails, because a
snippet that nobody executed has not been tested.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.distributed.processes import fork_processes

ROOT = Path(__file__).parent.parent

PLACEHOLDERS = '''
import torch

torch.manual_seed(0)


class Model(torch.nn.Module):
    """A language model as the snippets have it."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 50)

    def compute_embedding(self, inputs):
        return torch.tanh(self.embedding(inputs))

    def get_classifier_weights(self):
        return self.head.weight


model = Model()
inputs = input_ids = torch.randint(0, 50, (2, 6))
labels = targets = input_ids.clone()
labels[0, :2] = -100
embeddings = hidden = model.compute_embedding(inputs)
classifier = model.get_classifier_weights()
bias = model.head.bias
'''

TRANSFORMERS_PLACEHOLDERS = """
import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
)
model = transformers.LlamaForCausalLM(config)
transformers.AutoModelForCausalLM.from_pretrained = lambda *names, **options: model
input_ids = torch.randint(0, 50, (2, 6))
labels = input_ids.clone()
attention_mask = torch.ones(2, 6, dtype=torch.bool)
attention_mask[1, 4:] = False
"""

PUBLISHED = {
    "loss": """
from cut_cross_entropy import linear_cross_entropy

embeddings = model.compute_embedding(inputs)
classifier = model.get_classifier_weights()

loss = linear_cross_entropy(embeddings, classifier, labels)
""",
    "manual_shift_loss": """
from cut_cross_entropy import linear_cross_entropy

embeddings = model.compute_embedding(inputs)
classifier = model.get_classifier_weights()

shift_embeddings = embeddings[..., :-1, :].flatten(0, -2)
shift_labels = labels[..., 1:]

manual_shift_loss = linear_cross_entropy(shift_embeddings, classifier, shift_labels)
""",
    "auto_shift_loss": """
from cut_cross_entropy import linear_cross_entropy

embeddings = model.compute_embedding(inputs)
classifier = model.get_classifier_weights()

# This is the same as manual_shift_loss above
auto_shift_loss = linear_cross_entropy(embeddings, classifier, labels, shift=True)
""",
    "compiled_loss": """
from cut_cross_entropy import linear_cross_entropy

embeddings = model.compute_embedding(inputs)
classifier = model.get_classifier_weights()

compiled_loss = linear_cross_entropy(embeddings, classifier, labels, ..., impl="torch_compile")
""",
}


def without_ellipses(code):
    """``...`` stands for what the reader has: left out as an argument or as a value."""
    code = re.sub(r"^\w+ = \.\.\.[^\n]*\n", "", code, flags=re.MULTILINE)
    return re.sub(r"(, |(?<=\())\.\.\.(?=[,)])", "", code)


def execute(code):
    """The namespace after ``code`` ran with the placeholders bound."""
    names = {"__name__": "snippet"}
    exec(compile(PLACEHOLDERS, "placeholders", "exec"), names)
    exec(compile(without_ellipses(code), "snippet", "exec"), names)
    return names


@pytest.mark.parametrize("result", PUBLISHED)
def test_published_snippet(result):
    names = execute(PUBLISHED[result])
    hidden, labels = names["embeddings"], names["labels"]
    if "shift" in result:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    logits = hidden @ names["classifier"].T
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(names[result], expected)
    names[result].backward()
    assert torch.count_nonzero(names["model"].head.weight.grad) > 0


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks():
    """Every ``python`` block of our documents, by file and line."""
    for path in documents():
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{path.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("code", list(blocks()))
def test_block_of_our_documents(code):
    if "transformers" not in code:
        execute(code)
        return
    fork_processes(_run, (TRANSFORMERS_PLACEHOLDERS + without_ellipses(code),), 1)


def _run(rank, code):
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_readme_shows_how_to_call_the_loss():
    """An empty list of blocks would make the test above pass without a run."""
    codes = [block.values[0] for block in blocks()]
    assert any("linear_cross_entropy(" in code for code in codes)


def test_ellipses():
    assert without_ellipses('f(a, ..., impl="b")') == 'f(a, impl="b")'
    assert without_ellipses("f(...)\nmodel = ...\ny = x[..., 1:]\n") == "f()\ny = x[..., 1:]\n"
