"""Command lines of ``train.py`` and ``demo.py``, made from the fields of :class:`TrainConfig`."""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import cut_cross_entropy
from training.config import TrainConfig, flag

EXCLUSIVE = ("steps", "epochs")
"""Settings of which the command line takes one."""


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, with the closest valid spelling."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)
        self.add_argument(
            "--version",
            action="version",
            version=f"{self.prog} (cut-cross-entropy {cut_cross_entropy.__version__})",
            help="show the version and exit",
        )

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}{self._suggestion(message)}\n")

    def _suggestion(self, message: str) -> str:
        if choice := re.match(r"argument (--[\w-]+)\S*: invalid choice: '(.*?)'", message):
            known: Any = self._option_string_actions[choice[1]].choices
            word = choice[2]
        elif unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            known, word = list(self._option_string_actions), unknown[1]
        else:
            return f" ({self.prog} --help lists all flags)"
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""


def build_parser() -> Parser:
    """Build the command line of ``training/train.py``."""
    parser = Parser(
        prog="train.py",
        description="Fine-tune or pretrain a causal language model, with full logits or with "
        "linear_cross_entropy.",
    )
    add_settings(parser, [each.name for each in fields(TrainConfig)])
    return parser


def add_settings(parser: Parser, names: Sequence[str], **defaults: Any) -> None:
    """Add the flags of the settings ``names``; ``defaults`` replace theirs."""
    hints = get_type_hints(TrainConfig)
    one_of = parser.add_mutually_exclusive_group() if set(EXCLUSIVE) <= set(names) else parser
    for each in fields(TrainConfig):
        if each.name not in names:
            continue
        kind = hints[each.name]
        options = dict(each.metadata["options"])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kinds = (str,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
            options["type"] = next(one for one in kinds if one is not NoneType)
        default = defaults.get(each.name, each.default)
        if each.name in EXCLUSIVE and one_of is not parser:
            # argparse does not see the conflict if a value is the default.
            options["help"] += f" (default: {default})" if default else ""
            one_of.add_argument(flag(each.name), default=argparse.SUPPRESS, **options)
        else:
            parser.add_argument(flag(each.name), default=default, **options)


def config_from(arguments: argparse.Namespace) -> TrainConfig:
    """Return the settings in parsed ``arguments``; those missing keep their defaults.

    Raises:
        UsageError: see :class:`TrainConfig`.
    """
    known = {each.name for each in fields(TrainConfig)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in known
    }
    return TrainConfig(**given)


def table(parser: argparse.ArgumentParser) -> str:
    """Format the arguments as a Markdown table, for the documentation."""
    lines = ["| argument | default | meaning |", "|:---|:---|:---|"]
    for action in parser._actions:
        if action.dest in ("help", "version"):
            continue
        without = (None, (), argparse.SUPPRESS)
        default = "" if action.default in without else f"`{action.default}`"
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
        lines.append(f"| {flags} | {default} | {action.help} |")
    return "\n".join(lines)
