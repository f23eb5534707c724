"""Read text and conversations from files, from Python itself or through ``datasets``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUILTIN = "builtin"
"""Name of the text that every Python has: the language reference behind ``help()``."""

PAIR = ("chosen", "rejected")
"""Keys of the completions of a prompt, one of them preferred."""

SUFFIXES = (".txt", ".md", ".jsonl")
"""Files read from a folder."""

TABLES = {".csv": "csv", ".json": "json", ".parquet": "parquet"}
"""Files read by ``datasets``, and its names for them."""

REFUSED = (".tsv", ".xlsx", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz")
"""Files of structure or compression that would otherwise be taken for text."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of chat templates by their ShareGPT names; the others are the same."""

PIECE = 1 << 16
"""Characters of a text file read at a time, extended to the end of the line."""

LONGEST_LINE = 1 << 20
"""Characters after which a line without an end is cut: a file need not have lines."""

Message = dict[str, Any]
"""``role`` and ``content``."""


@dataclass(frozen=True)
class Document:
    """A text, a piece of a long one, a prompt with its completion, or a conversation."""

    text: str = ""
    messages: tuple[Message, ...] | None = None
    ends: bool = True
    """False for a piece that the next document continues."""
    prompt: str | tuple[Message, ...] = ""
    """Precedes the text or the messages; no loss is computed for it."""
    where: str = field(default="data", compare=False)
    """Its origin, for errors."""

    @property
    def roles(self) -> set[str]:
        """Roles of the messages after the prompt."""
        return {message["role"] for message in self.messages or ()}


def documents(
    source: str,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
    flag: str = "--data",
    completion: str = "completion",
) -> Iterator[Document]:
    """Read ``source`` lazily: no text file is ever held as a whole.

    Args:
        source: ``"builtin"``; a UTF-8 text file; a ``.jsonl`` file with one object per line; a
            folder of such files; a ``.json``, ``.csv`` or ``.parquet`` file; or a data set that
            ``datasets.load_dataset`` finds (``name`` or ``name:configuration``).
        split: split of a data set.
        column: column or key that holds a text or a conversation (a list of ``{"role": ...,
            "content": ...}`` or ``{"from": ..., "value": ...}``). If it is ``"text"`` and missing,
            ``messages``, ``conversations`` or ``prompt`` with ``completion`` is read instead.
        streaming: whether a data set is downloaded as it is read.
        flag: argument to name in errors.
        completion: key of what follows a prompt. With another than ``"completion"``, one of
            ``PAIR``, only prompts with it are read.

    Raises:
        FileNotFoundError: neither a file nor a data set.
        ValueError: only white space, not UTF-8, an unsupported or damaged file, or no such split
            or column.
    """
    if source == BUILTIN and completion in PAIR:
        yield from _sums(completion)
        return
    if source == BUILTIN:
        from pydoc_data.topics import topics

        yield Document("\n\n".join(topics[name] for name in sorted(topics)))
        return
    path, what = Path(source), f"{flag} {source!r}"
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        found: Iterator[Document] = (
            document for file in files for document in _read_file(file, column, flag, completion)
        )
    elif path.is_file() and path.suffix.lower() not in TABLES:
        found = _read_file(path, column, flag, completion)
    else:
        found = _read_dataset(source, split, column, streaming, flag=flag, completion=completion)
    empty = True
    for document in found:
        empty = empty and not (document.messages or document.text.strip())
        yield document
    if empty:
        only = f" (of a folder, {', '.join(SUFFIXES)} are read)" if path.is_dir() else ""
        raise ValueError(f"{what} holds no text{only}")


def _sums(completion: str) -> Iterator[Document]:
    """Add numbers below 20, rightly if the ``completion`` is to be chosen, and else wrongly."""
    for a in range(20):
        for b in range(20):
            error = 0 if completion == PAIR[0] else 1 + (3 * a + b) % 7
            yield Document(f" {a + b + error}", prompt=f"{a} + {b} =", where=f"{a} + {b}")


def _read_file(path: Path, column: str, flag: str, completion: str) -> Iterator[Document]:
    what = f"{flag} {str(path)!r}"
    if path.suffix.lower() in REFUSED:
        raise ValueError(
            f"{what}: {path.suffix} files are not read; "
            f"convert to text, .jsonl or {', '.join(TABLES)}"
        )
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix.lower() == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _parse_line(line, column, f"{what}, line {number}", completion)
                return
            piece = _read_piece(file)
            while piece:
                following = _read_piece(file)
                yield Document(piece, ends=not following)
                piece = following
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}") from error


def _read_piece(file: Any) -> str:
    piece: str = file.read(PIECE)
    return piece + file.readline(LONGEST_LINE) if piece else piece


def _parse_line(line: str, column: str, where: str, completion: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: invalid JSON ({error})") from error
    return _document(row if isinstance(row, dict) else {}, column, where, completion)


def _document(row: Mapping[str, Any], column: str, where: str, completion: str) -> Document:
    names = [column, "messages", "conversations"] if column == "text" else [column]
    if completion in PAIR:
        names, column = [], "text"
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is not None:
        text, messages = _text_or_messages(value, where)
        return Document(text, messages, where=where)
    if column == "text" and row.get("prompt") is not None and row.get(completion) is not None:
        prompt, asked = _text_or_messages(row["prompt"], where)
        text, messages = _text_or_messages(row[completion], where)
        if (asked is None) == (messages is None):
            return Document(text, messages, prompt=asked or prompt, where=where)
    if completion in PAIR:
        raise ValueError(
            f"{where}: must be an object with 'prompt', 'chosen' and 'rejected', all texts or all "
            "lists of messages"
        )
    others = ", 'messages', 'conversations', or 'prompt' and 'completion'"
    raise ValueError(
        f"{where}: must be an object with {column!r}{others if column == 'text' else ''}"
    )


def _text_or_messages(value: Any, where: str) -> tuple[str, tuple[Message, ...] | None]:
    if isinstance(value, str):
        return value, None
    if isinstance(value, Sequence) and value and all(isinstance(m, dict) for m in value):
        if all({"role", "content"} <= set(m) for m in value):
            return "", tuple(value)
        if all({"from", "value"} <= set(m) for m in value):
            return "", tuple(
                {"role": ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in value
            )
    raise ValueError(
        f"{where}: must be a text or a list of messages with 'role' and 'content' (or 'from' and "
        f"'value'), got {str(value)[:60]!r}"
    )


def _read_dataset(
    source: str, split: str, column: str, streaming: bool, flag: str, completion: str
) -> Iterator[Document]:
    path, what = Path(source), f"{flag} {source!r}"
    kind = TABLES.get(path.suffix.lower()) if path.is_file() else None
    problem = (
        f"{what} cannot be read"
        if kind
        else f"{flag} must be {BUILTIN!r}, a file, a folder or the name of a data set, got "
        f"{source!r}: there is no such file"
    )
    suffixes = (*SUFFIXES, *TABLES, *REFUSED)
    looks_like_a_path = path.suffix.lower() in suffixes or source[0] in "/.~" or "\\" in source
    if looks_like_a_path and not kind:
        raise FileNotFoundError(problem)  # asking a hub takes long
    try:
        import datasets
    except ImportError as error:
        raise FileNotFoundError(f"{problem}, and `datasets` is not installed") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised as well
    name, _, configuration = source.partition(":")
    try:
        if kind:
            dataset = datasets.load_dataset(kind, data_files=source, streaming=streaming)
            split = "train"  # the one that datasets makes of files
        else:
            dataset = datasets.load_dataset(name, configuration or None, streaming=streaming)
    except Exception as error:  # datasets and the hub client have no common class of errors
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{problem}, and `datasets` says: {reason}") from error
    if split not in dataset:
        raise ValueError(f"{what} has the splits {', '.join(dataset)}, got {split!r}")
    columns = dataset[split].column_names
    if columns is not None and "__index_level_0__" in columns:
        raise ValueError(f"{what} has rows with more fields than the header")
    default = {"messages", "conversations", "prompt"} if column == "text" else set()
    # A stream may not know its columns.
    if columns is not None and not {column, *default} & set(columns):
        raise ValueError(f"{what} has the columns {', '.join(columns)}, got {column!r}")
    for number, row in enumerate(dataset[split]):
        yield _document(row, column, f"{what}, row {number}", completion)
