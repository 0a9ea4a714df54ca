"""Errors that the user can fix."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

DISTRIBUTION = "fastllm-kernels"  # what pip installs; the name fastllm on the index is another project's


class UserError(Exception):
    """Something in the input, the configuration or the machine is wrong; the message is one clear line."""


class ParameterError(UserError):
    """A parameter of a request is wrong; ``name`` is its name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or the choices where none is near."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; choose from {', '.join(choices)}"


def require_packages(what: str, *packages: str, install: str = "") -> None:
    """Raise UserError where one of ``packages`` can't be imported; ``install``: how to get them, by default the extra
    "data"."""
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} needs {' and '.join(packages)}: {install or pip_install('data')}") from None


def pip_install(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml needs."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'
