"""Documents become rows: sources, chat masks, packing, streaming."""

import json
import random
import re
import sys
import tracemalloc

import pytest
import torch
import transformers

from training.data import Document, documents
from training.models import load_model
from training.packing import IGNORED, collate, encode, encode_chat, make_rows
from training.rows import LoadedRows, StreamedRows
from training.train import main

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    """One token a byte, with a chat template and an end of text."""
    tokenizer = load_model(str(model_folder), torch.float32, None)[1]
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def with_end(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "eos_token_id", 7, raising=False)
    return tokenizer


class TestDocuments:
    def test_a_text_file_comes_in_pieces_that_add_up(self, tmp_path, monkeypatch):
        monkeypatch.setattr("training.data.PIECE", 50)
        path = tmp_path / "text.txt"
        text = "".join(f"line {i} of the text\n" for i in range(40))
        path.write_text(text, encoding="utf-8")
        pieces = list(documents(str(path)))
        assert "".join(piece.text for piece in pieces) == text
        assert all(piece.text.endswith("\n") for piece in pieces)
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]

    def test_json_lines(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        rows = [{"text": "plain"}, {"messages": CHAT}, {"text": CHAT}]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
        assert list(documents(str(path))) == [
            Document("plain"),
            Document(messages=tuple(CHAT)),
            Document(messages=tuple(CHAT)),
        ]

    def test_sharegpt_and_completions(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        shared = [{"from": "system", "value": "Be."}, {"from": "human", "value": "One?"}]
        shared.append({"from": "gpt", "value": "Two."})
        rows = [
            {"conversations": shared},
            {"prompt": "One?", "completion": "Two."},
            {"prompt": CHAT[:3], "completion": CHAT[3:]},
        ]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        system = {"role": "system", "content": "Be."}
        assert list(documents(str(path))) == [
            Document(messages=(system, *CHAT[:2])),
            Document("Two.", prompt="One?"),
            Document(messages=tuple(CHAT[3:]), prompt=tuple(CHAT[:3])),
        ]

    def test_another_column_is_the_only_one_read(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"messages": CHAT, "body": "this"}) + "\n")
        assert list(documents(str(path), column="body")) == [Document("this")]
        with pytest.raises(ValueError, match=r"line 1: must be an object with 'title'$"):
            list(documents(str(path), column="title"))

    @pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
    def test_tables(self, tmp_path, suffix, monkeypatch):
        pytest.importorskip("datasets")
        pandas = pytest.importorskip("pandas")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        frame = pandas.DataFrame({"text": ["one, two", "three"], "title": ["a", "b"]})
        path = tmp_path / f"rows.{suffix}"
        if suffix == "json":
            frame.to_json(path, orient="records")
        else:
            getattr(frame, f"to_{suffix}")(path, index=False)
        for streaming in (False, True):
            found = list(documents(str(path), streaming=streaming))
            assert found == [Document("one, two"), Document("three")]
        assert [d.text for d in documents(str(path), column="title")] == ["a", "b"]
        with pytest.raises(ValueError, match=r"has the columns text, title, got 'body'"):
            list(documents(str(path), column="body"))

    def test_a_comma_that_is_not_quoted_loses_no_text(self, tmp_path, monkeypatch):
        """The first field would be taken for the name of the row."""
        pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        path = tmp_path / "rows.csv"
        path.write_text("text\nfirst, second\nthird, fourth\n")
        with pytest.raises(ValueError, match="rows with more fields than the header"):
            list(documents(str(path)))

    @pytest.mark.parametrize("suffix", [".tsv", ".jsonl.gz", ".XLSX"])
    def test_other_formats_are_refused_not_read_as_text(self, tmp_path, suffix):
        path = tmp_path / f"rows{suffix}"
        path.write_text("text\tone\n")
        with pytest.raises(ValueError, match=r"--eval-data .* files are not read; convert to text"):
            list(documents(str(path), flag="--eval-data"))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "cut o', r"line 2: invalid JSON \("),
            ('["a"]', "line 2: must be an object with 'text', 'messages', .*'completion'"),
            ('{"title": "a"}', "line 2: must be an object with 'text', 'messages', .*'completion'"),
            ('{"text": 3}', "line 2: must be a text or a list of messages .* got '3'"),
            ('{"messages": [{"role": "user"}]}', "line 2: must be a text or a list of messages"),
            ('{"messages": []}', "line 2: must be a text or a list of messages"),
        ],
    )
    def test_damaged_line_is_named(self, tmp_path, line, message):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            list(documents(str(path)))

    def test_a_folder_in_the_order_of_its_names(self, tmp_path):
        (tmp_path / "b.txt").write_text("second")
        (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
        (tmp_path / "c.bin").write_bytes(b"\xff")
        assert [document.text for document in documents(str(tmp_path))] == ["first", "second"]

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"holds no text \(of a folder, \.txt, \.md, \.jsonl are"
        ):
            list(documents(str(tmp_path)))

    def test_a_path_that_is_not_there_is_not_looked_up(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        for name in ("missing.txt", "/no/such/folder"):
            with pytest.raises(FileNotFoundError, match=r"there is no such file$"):
                list(documents(name))


class TestChat:
    def test_only_answers_have_labels(self, tokenizer):
        ids, labels = encode_chat(CHAT, tokenizer)
        whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert tokenizer.decode(ids) == whole
        learned = [i if i == label else None for i, label in zip(ids, labels, strict=True)]
        assert set(labels) - set(ids) == {IGNORED}
        answers = tokenizer.decode([i for i in learned if i is not None])
        assert answers == "Two.|\nFour.|\n"

    def test_no_template(self, model_folder):
        plain = load_model(str(model_folder), torch.float32, None)[1]
        with pytest.raises(ValueError, match="the tokenizer has no chat template"):
            encode(Document(messages=tuple(CHAT)), plain)

    def test_a_template_that_rewrites_what_was_said(self, tokenizer, monkeypatch):
        monkeypatch.setattr(
            tokenizer, "chat_template", "{{ messages | length }}" + TEMPLATE, raising=False
        )
        with pytest.raises(ValueError, match="rewrites earlier messages when message 2 is added"):
            encode_chat(CHAT, tokenizer)

    def test_only_the_completion_has_labels(self, with_end):
        ids, labels = encode(Document("Two.", prompt="One?"), with_end)
        assert with_end.decode(ids[:-1]) == "One?Two."
        assert labels == [IGNORED] * 4 + ids[4:]
        assert labels[-1] == 7
        whole, first = encode_chat(CHAT, with_end)[0], tuple(CHAT[:3])
        ids, labels = encode(Document(messages=tuple(CHAT[3:]), prompt=first), with_end)
        assert ids == whole
        learned = [i for i, label in zip(ids, labels, strict=True) if label != IGNORED]
        assert with_end.decode(learned) == "Four.|\n"

    @pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["loaded", "streaming"])
    @pytest.mark.parametrize(
        ("template", "messages", "message"),
        [
            (
                "{{ raise_exception('Roles must alternate') if messages[0].role == 'assistant' }}"
                + TEMPLATE,
                CHAT[1:],
                "line 1: the chat template of the tokenizer refuses the conversation: ",
            ),
            (
                "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}",
                CHAT,
                "line 1: the chat template of the tokenizer refuses the conversation: ",
            ),
            (None, CHAT, "line 1: conversations need a chat template"),
            (
                TEMPLATE,
                CHAT[:1] * 3,
                "its conversations have messages of user, none of an assistant",
            ),
        ],
        ids=["raises", "fails", "absent", "no answer"],
    )
    def test_conversations_that_do_not_fit(
        self, arguments, model_folder, tmp_path, capsys, template, messages, message, streaming
    ):
        folder, path = tmp_path / "tokenizer", tmp_path / "chat.jsonl"
        tokenizer = load_model(str(model_folder), torch.float32, None)[1]
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        path.write_text(json.dumps({"messages": messages}) + "\n")
        words = ["--data", str(path), "--tokenizer", str(folder), *streaming]
        assert main([*arguments, *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"train.py: error: --data {str(path)!r}")
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
    def test_conversations_without_an_answer_are_counted(
        self, arguments, tokenizer, model_folder, tmp_path, capsys, packing
    ):
        """The others train; these teach nothing, and the header says how many they are."""
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        path = tmp_path / "chat.jsonl"
        rows = [CHAT, CHAT[:1], CHAT, CHAT[2:3], CHAT]
        path.write_text("\n".join(json.dumps({"messages": messages}) for messages in rows))
        words = ["--data", str(path), "--tokenizer", str(tmp_path / "tokenizer"), packing]
        common = [*arguments, *words, "--steps", "1", "--no-export", "--sequence-length", "64"]
        assert main(common) == 0
        said = "tokens; conversations without an assistant's message, not learned: 2\n"
        assert said in capsys.readouterr().out
        output = ["--output", str(tmp_path / "stream")]
        assert main([*common, *output, "--streaming", "--shuffle-buffer", "5"]) == 0
        said = r"without an assistant's message, not learned: \d, in the last pass over the data\n"
        assert re.search(said, capsys.readouterr().out)
        path.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in rows))
        assert main([*common, "--output", str(tmp_path / "all")]) == 0
        assert "without an assistant" not in capsys.readouterr().out

    def test_prompts_add_nothing_to_the_loss(self, tokenizer, model_folder):
        model = load_model(str(model_folder), torch.float32, None)[0].eval()
        (row,) = make_rows([Document(messages=tuple(CHAT))], tokenizer, 200, packing=False)
        batch = collate([row])
        with torch.no_grad():
            loss = model(**batch).loss
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        targets = batch["labels"][0, 1:]
        learned = targets != IGNORED
        expected = torch.nn.functional.cross_entropy(logits[learned], targets[learned])
        assert 0 < learned.sum() < len(targets)
        torch.testing.assert_close(loss, expected)


class TestPacking:
    def test_rows_are_full_and_nothing_is_lost_but_the_rest(self, with_end):
        found = [Document("abc"), Document("defgh", ends=False), Document("ij"), Document("k")]
        rows = list(make_rows(found, with_end, length=4))
        ids = torch.cat([row["input_ids"] for row in rows])
        whole = [i for text in ("abc", "defghij", "k") for i in (*with_end(text).input_ids, 7)]
        assert ids.tolist() == whole[: len(whole) // 4 * 4]
        assert all(torch.equal(row["input_ids"], row["labels"]) for row in rows)

    def test_isolated_documents_have_the_losses_they_have_alone(self, tokenizer, model_folder):
        model = load_model(str(model_folder), torch.float32, None)[0].eval()
        texts = ["first text", "another one", "end"]
        (row,) = make_rows([Document(text) for text in texts], tokenizer, 24, isolate=True)
        batch = collate([row])
        assert batch["position_ids"][0].tolist() == [*range(10), *range(11), *range(3)]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0]
            start = 0
            for text in texts:
                alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
                torch.testing.assert_close(logits[start : start + len(alone)], alone)
                assert row["labels"][start] == IGNORED
                start += len(alone)

    def test_a_document_that_goes_on_in_the_next_row_begins_at_zero(self, tokenizer):
        rows = list(make_rows([Document("abcdef"), Document("gh")], tokenizer, 4, isolate=True))
        assert [row["position_ids"].tolist() for row in rows] == [[0, 1, 2, 3], [0, 1, 0, 1]]

    def test_one_by_one_cuts_pads_and_leaves_out_what_teaches_nothing(self, tokenizer):
        found = [Document("abcdef"), Document("g"), Document("hi", ends=False), Document("jk")]
        rows = list(make_rows(found, tokenizer, 5, packing=False))
        texts = [tokenizer.decode(row["input_ids"]) for row in rows]
        assert texts == ["abcde", "hijk"]
        batch = collate(rows, pad_id=9)
        assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0]]
        assert batch["input_ids"][1, 4] == 9
        assert batch["labels"][1, 4] == IGNORED


class TestStreaming:
    def test_each_pass_has_every_row_once_in_its_own_order(self, tokenizer):
        def make():
            return make_rows([Document("abcdefghijklmnopqrstuvwxyz" * 3)], tokenizer, 2)

        once = [tuple(row["input_ids"].tolist()) for row in make()]
        stream = iter(StreamedRows(make, "x", seed=0, buffer=8))
        passes = [[tuple(next(stream)["input_ids"].tolist()) for _ in once] for _ in range(2)]
        for each in passes:
            assert sorted(each) == sorted(once)
            assert each != once
        assert passes[0] != passes[1]
        random.seed(9)
        again = iter(StreamedRows(make, "x", seed=0, buffer=8))
        assert [tuple(next(again)["input_ids"].tolist()) for _ in once] == passes[0]

    def test_memory_does_not_grow_with_the_file(self, tmp_path):
        path = tmp_path / "large.txt"
        block = "".join(f"{i} is a number\n" for i in range(5000))
        with path.open("w", encoding="utf-8") as file:
            for _ in range(150):
                file.write(block)
        tokenizer = _Words()
        size = path.stat().st_size
        assert size > 10_000_000

        def make():
            return make_rows(documents(str(path)), tokenizer, 512)

        stream = StreamedRows(make, str(path), seed=0, buffer=16)
        tracemalloc.start()
        count = sum(1 for _ in stream._one_pass(0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == size // 10 // 512
        assert peak < size / 4

    def test_fingerprint_follows_the_file(self, tmp_path):
        path = tmp_path / "text.txt"
        found = []
        for text in ("one", "two", "three"):
            path.write_text(text)
            found.append(StreamedRows(list, str(path), 0, 1).fingerprint())
        assert len(set(found)) == 3

    def test_a_line_that_is_damaged_later_ends_the_run(self, arguments, tmp_path, capsys):
        path = tmp_path / "rows.jsonl"
        lines = [json.dumps({"text": f"A text for row {i}, long enough."}) for i in range(400)]
        path.write_text("\n".join([*lines, '{"text": "cut o']), encoding="utf-8")
        changed = ["--data", str(path), "--streaming", "--shuffle-buffer", "1", "--steps", "200"]
        assert main([*arguments, *changed, "--no-export", "--checkpoint-interval", "20"]) == 1
        assert "line 401: invalid JSON" in capsys.readouterr().err
        assert (tmp_path / "run/checkpoints/checkpoint-80").is_dir()


class _Words:
    """A tokenizer that needs no memory of its own: ten characters are a token."""

    eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(text[i]) for i in range(0, len(text), 10)]}


def test_held_out_rows_are_not_trained_on():
    rows = [{"input_ids": torch.tensor([i, i]), "labels": torch.tensor([i, i])} for i in range(20)]
    data, held_out = LoadedRows(rows).without(5, seed=3)
    firsts = [[int(row["input_ids"][0]) for row in part.rows] for part in (data, held_out)]
    assert len(firsts[1]) == 5
    assert sorted(firsts[0] + firsts[1]) == list(range(20))
    assert data.fingerprint() != held_out.fingerprint()


def test_conversations_train_from_the_command_line(arguments, tokenizer, tmp_path, model_folder):
    folder = tmp_path / "chat_model"
    transformers.AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(30)))
    common = [*arguments, "--model", str(folder), "--data", str(path), "--steps", "4"]
    for kind in ("--packing", "--no-packing"):
        output = tmp_path / kind
        assert main([*common, kind, "--sequence-length", "64", "--output", str(output)]) == 0
        history = json.loads((output / "checkpoints/checkpoint-4/trainer_state.json").read_text())[
            "log_history"
        ]
        assert history[-1]["loss"] < history[0]["loss"]
