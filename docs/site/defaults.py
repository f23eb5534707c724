"""Griffe extension for the API page: default values instead of names, no Sphinx roles."""

import re
from typing import Any

from griffe import (
    AliasResolutionError,
    Attribute,
    Expr,
    ExprCall,
    ExprIfExp,
    ExprKeyword,
    Extension,
    Function,
    NameResolutionError,
)

ROLE = re.compile(r":(?:class|func|meth|mod):`(?:~[\w.]*\.)?")


class DefaultValues(Extension):
    """Replace defaults such as ``IGNORE_INDEX`` by the constant's value, ``-100``.

    Roles such as ``:func:`` are left out of the docstrings, since Markdown prints them as they are.
    """

    def on_package(self, *, pkg: Any, **kwargs: Any) -> None:
        """Visit every function of the package once all its modules are loaded."""
        self._visit(pkg, pkg)

    def _visit(self, module_or_class: Any, package: Any) -> None:
        for member in module_or_class.members.values():
            if member.is_alias:
                continue
            if member.docstring:
                member.docstring.value = ROLE.sub("`", member.docstring.value)
            if isinstance(member, Function):
                for parameter in member.parameters:
                    parameter.default = _value(parameter.default, package)
            elif isinstance(member, Attribute) and module_or_class.is_class:
                # A dataclass makes the parameters of its __init__ of these.
                if isinstance(member.value, ExprCall):
                    for argument in member.value.arguments:
                        if isinstance(argument, ExprKeyword) and argument.name == "default":
                            argument.value = _value(argument.value, package)
                else:
                    member.value = _value(member.value, package)
            elif member.is_module or member.is_class:
                self._visit(member, package)


def _value(default: Any, package: Any) -> Any:
    """Value of the package's constant that ``default`` names, or ``default`` itself."""
    if not isinstance(default, Expr):
        return default
    prefix = f"{package.path}."
    path = default.canonical_path
    try:
        constant = package[path.removeprefix(prefix)] if path.startswith(prefix) else None
        value = getattr(constant, "value", None)
    except (AliasResolutionError, KeyError, NameResolutionError):
        return default
    # A constant that depends on the platform: the value on Linux.
    if isinstance(value, ExprIfExp):
        value = value.orelse
    return default if value is None else value
