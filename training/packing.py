"""Turn documents into rows of tokens: chat templates, masked prompts, packing, batches."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from training.data import Document

IGNORED = -100
"""Label of a token that no loss is computed for."""

Row = dict[str, Tensor]
"""``input_ids``, ``labels`` and perhaps ``position_ids`` of one sequence, (T,), int64."""


def encode(document: Document, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids and labels of ``document``.

    Where a text ends, the end-of-text token follows if there is one. Prompts have no labels.

    Raises:
        ValueError: a conversation without a chat template, or a template that does not fit.
    """
    if document.messages is not None:
        before = document.prompt or ()
        messages = (*before, *document.messages)
        try:
            return encode_chat(messages, tokenizer, len(before))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{document.where}: {error}") from error

    def ids_of(text: Any) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    prompt = ids_of(document.prompt) if document.prompt else []
    ids = ids_of(document.text)
    if document.ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return prompt + ids, [IGNORED] * len(prompt) + ids


def encode_chat(
    messages: Sequence[dict[str, Any]], tokenizer: Any, first: int = 0
) -> tuple[list[int], list[int]]:
    """Encode a conversation with the chat template; only the assistant's messages have labels.

    Prompt and answer are tokenized separately, as they are when the model answers, so that no token
    spans both. The end of a turn that the template writes after an answer belongs to it.

    Args:
        messages: dictionaries with ``role`` and ``content``.
        tokenizer: a tokenizer with a chat template.
        first: messages at the beginning that have no labels either.

    Raises:
        ValueError: no template, one that refuses the conversation, or one that changes earlier
            text when a message is added.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "conversations need a chat template, and the tokenizer has no chat template; "
            "name another --tokenizer"
        )

    def render(count: int, ask: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages[:count]), tokenize=False, add_generation_prompt=ask
                )
            )
        except Exception as error:  # templates are programs, and raise what they like
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the chat template of the tokenizer refuses the conversation: {reason}"
            ) from error

    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for index, message in enumerate(messages):
        learned = message["role"] == "assistant" and index >= first
        parts = [(index + 1, False, learned)]
        if message["role"] == "assistant":
            parts.insert(0, (index, True, False))  # up to where the model begins to answer
        for count, ask, has_labels in parts:
            text = render(count, ask)
            if not text.startswith(done):
                raise ValueError(
                    "the chat template of the tokenizer rewrites earlier messages when "
                    f"message {index + 1} is added; prompts cannot be masked with it"
                )
            part = tokenizer(text[len(done) :], add_special_tokens=False, verbose=False)
            ids += part["input_ids"]
            labels += part["input_ids"] if has_labels else [IGNORED] * len(part["input_ids"])
            done = text
    return ids, labels


def make_rows(
    found: Iterable[Document],
    tokenizer: Any,
    length: int,
    packing: bool = True,
    isolate: bool = False,
) -> Iterator[Row]:
    """Make rows of at most ``length`` tokens of documents.

    Args:
        found: the documents.
        tokenizer: for :func:`encode`.
        length: tokens per row.
        packing: concatenate documents to rows of exactly ``length`` tokens and leave out the
            remainder. Else each document has a row of its own, or several if it is longer, and rows
            without a label to learn are left out.
        isolate: when packing, add ``position_ids`` that begin anew with each document, by which
            transformers keeps attention inside it; and no document predicts the first token of the
            next.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    position = 0
    for document in found:
        new_ids, new_labels = encode(document, tokenizer)
        if isolate and position == 0 and new_labels:
            new_labels[0] = IGNORED
        ids += new_ids
        labels += new_labels
        positions += range(position, position + len(new_ids))
        position = 0 if document.ends else position + len(new_ids)
        ready = len(ids) // length * length
        if document.ends and not packing:
            ready = len(ids)
        for start in range(0, ready, length):
            part = slice(start, min(start + length, ready))
            row = {"input_ids": torch.tensor(ids[part]), "labels": torch.tensor(labels[part])}
            if isolate:
                row["position_ids"] = _from_zero(torch.tensor(positions[part]))
            if packing or is_learned(row):
                yield row
        del ids[:ready], labels[:ready], positions[:ready]


def make_pairs(
    chosen: Iterable[Document], rejected: Iterable[Document], tokenizer: Any, length: int
) -> Iterator[Row]:
    """Make a row of each pair of documents, one after the other, with their ``lengths`` (2,).

    Raises:
        ValueError: a document has more than ``length`` tokens.
    """
    for pair in zip(chosen, rejected, strict=True):
        encoded = [encode(document, tokenizer) for document in pair]
        lengths = [len(ids) for ids, _ in encoded]
        if max(lengths) > length:
            raise ValueError(
                f"{pair[0].where}: a prompt with its completion has {max(lengths)} tokens, more "
                f"than --sequence-length {length}"
            )
        ids, labels = (torch.tensor(first + second) for first, second in zip(*encoded, strict=True))
        yield {"input_ids": ids, "labels": labels, "lengths": torch.tensor(lengths)}


def is_learned(row: Row) -> bool:
    """Tell whether ``row`` has a token to learn."""
    return bool((row["labels"][1:] != IGNORED).any())


def _from_zero(positions: Tensor) -> Tensor:
    """Let the first document, begun in an earlier row, start at position 0."""
    begins = (positions == 0).nonzero()
    end = int(begins[0]) if len(begins) else len(positions)
    positions[:end] -= positions[0].clone()
    return positions


def collate(rows: Sequence[Row], pad_id: int = 0) -> Row:
    """Stack rows to a batch (B, T), padded and with an ``attention_mask`` if lengths differ."""
    longest = max(len(row["input_ids"]) for row in rows)
    if all(len(row["input_ids"]) == longest for row in rows):
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    batch: Row = {}
    for name, filler in (("input_ids", pad_id), ("labels", IGNORED)):
        batch[name] = torch.full((len(rows), longest), filler)
        for line, row in zip(batch[name], rows, strict=True):
            line[: len(row[name])] = row[name]
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def collate_pairs(rows: Sequence[Row], pad_id: int = 0) -> Row:
    """Stack the halves of rows of pairs to a batch of twice as many, the chosen ones first."""
    halves = [
        {name: row[name].split(row["lengths"].tolist())[half] for name in ("input_ids", "labels")}
        for half in (0, 1)
        for row in rows
    ]
    batch = collate(halves, pad_id)
    if all("reference" in row for row in rows):
        batch["reference"] = torch.stack([row["reference"] for row in rows])
    return batch
