"""The examples on a tiny model: the losses of each are those of its run with ``--plain``."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import examples
from tests.distributed.processes import fork_processes
from tests.examples.counted import run_examples
from tests.transformers.models import SIZES, VOCAB, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS = 3
SCRIPTS = sorted(
    path for path in Path(examples.__file__).parent.glob("*.py") if path.name != "__init__.py"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model whose tokenizer knows the words of the examples' sums."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<pad>", "<s>", "</s>", "+", "=", ",", *map(str, range(VOCAB - 6))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def capped(model, tmp_path_factory):
    """The folder of a model whose logits are capped."""
    folder = tmp_path_factory.mktemp("capped")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=30.0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def calls(monkeypatch):
    """The names of the library's functions that computed losses, call by call."""
    # The package's function of this name hides the module.
    module = importlib.import_module("cut_cross_entropy.linear_cross_entropy")
    seen = []
    for name in ("token_losses", "sum_of_losses"):
        original = getattr(module, name)

        def counted(*args, _name=name, _original=original, **options):
            seen.append(_name)
            return _original(*args, **options)

        monkeypatch.setattr(module, name, counted)
    return seen


@pytest.mark.parametrize("name", ["plain_loop", "trainer"])
def test_losses_are_the_same_as_with_logits(name, model, calls, tmp_path, capsys):
    main = importlib.import_module(f"examples.{name}").main
    output = ["--output", str(tmp_path)] if name != "plain_loop" else []
    arguments = ["--model", model, "--steps", str(STEPS), *output]
    plain = main([*arguments, "--plain"])
    assert not calls
    capsys.readouterr()
    ours = main(arguments)
    assert len(calls) == STEPS
    assert len(plain) == STEPS
    assert len(set(plain)) == STEPS
    # Float32 sums in another order, and after the first step weights that differ by these.
    assert ours == pytest.approx(plain, rel=1e-5)
    printed = re.findall(r"loss\W+(\d+\.\d+)", capsys.readouterr().out)
    assert [float(loss) for loss in printed[:STEPS]] == pytest.approx(ours, abs=1e-3)


def test_distillation_has_the_divergences_of_logits(model, monkeypatch, capsys):
    distill = importlib.import_module("examples.distill")
    plain = distill.main(["--model", model, "--steps", str(STEPS), "--plain"])
    seen, original = [], distill.linear_divergence
    monkeypatch.setattr(
        distill,
        "linear_divergence",
        lambda *args, **options: seen.append(1) or original(*args, **options),
    )
    ours = distill.main(["--model", model, "--steps", str(STEPS)])
    assert len(seen) == len(plain) == len(set(plain)) == STEPS
    assert min(plain) > 1e-4, "half of the layers differ from all"
    # Small differences of float32 log-probabilities: 1.03e-4 apart on one kind of CPU.
    assert ours == pytest.approx(plain, rel=5e-4)
    assert capsys.readouterr().out.count(": loss ") == 2 * STEPS


@pytest.mark.parametrize("name", ["plain_loop", "distill", "vocab_parallel"])
def test_a_head_with_more_than_a_product_is_refused(name, capped, monkeypatch):
    """These examples compute their losses from the head's weight alone."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_: None)  # of vocab_parallel
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    main = importlib.import_module(f"examples.{name}").main
    with pytest.raises(ValueError, match="without bias, softcap and scale"):
        main(["--model", capped, "--steps", "1"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short(script):
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    assert ast.get_docstring(ast.parse(source))
    assert f"examples.{script.stem}`" in (script.parent / "README.md").read_text(encoding="utf-8")


def test_sft_has_the_losses_of_trl(model, tmp_path, capsys):
    sft = importlib.import_module("examples.sft")
    arguments = ["--model", model, "--steps", str(STEPS), "--output", str(tmp_path)]
    plain = sft.main([*arguments, "--plain"])
    assert "TRL's output layer" in capsys.readouterr().out
    ours = sft.main(arguments)
    assert f"token_logprobs: {STEPS} calls" in capsys.readouterr().out
    assert len(set(plain)) == len(plain) == STEPS
    assert ours == pytest.approx(plain, rel=1e-5)  # float32 sums in another order


def test_two_processes_have_the_losses_of_logits(model, tmp_path):
    names = ["fsdp2", "vocab_parallel"]
    fork_processes(run_examples, (2, str(tmp_path), model, STEPS, names), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name in names:
        (plain, none, _), (ours, calls, _) = first[name].values()
        for way, (_, _, printed) in first[name].items():
            assert printed.count(": loss ") == STEPS
            assert ": loss " not in second[name][way][2]  # rank 0 alone prints
        assert none == 0
        assert calls == STEPS
        assert len(set(plain)) == len(plain) == STEPS
        assert ours == pytest.approx(plain, rel=1e-5), name  # float32 sums in another order
