"""Files that others wrote, read with care: regular files of a bounded size, and JSON of the expected types."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import UserError

JSON_LIMIT = 16 * 2**20  # bytes; the largest index of a Hugging Face model has 9 million
MAX_SIZE = 2**30  # of any one size in a configuration: the bytes of a matrix still fit into 64 bits


def open_regular(path: str | Path, what: str = "") -> BufferedReader:
    """The file at ``path``, opened for reading; UserError for pipes, devices and folders, without waiting for them.

    ``what``: words for errors that go before the path, with a space at the end.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"can't read {what}{path}: {_reason(error)}") from None
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"can't read {what}{path}: it is {kind}, not a file")
    return open(number, "rb")


def read_bytes(path: str | Path, limit: int = JSON_LIMIT, what: str = "") -> bytes:
    """The content of a regular file of at most ``limit`` bytes; UserError otherwise. ``what``: see open_regular."""
    with open_regular(path, what) as file:
        try:
            content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
        except OSError as error:
            raise UserError(f"can't read {what}{path}: {_reason(error)}") from None
    if content is None or len(content) > limit:
        raise UserError(f"can't read {what}{path}: it is too large: more than {limit:,} bytes")
    return content


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_json(read_bytes(path, limit), path)


def parse_json(content: bytes, path: str | Path) -> dict[str, Any]:
    """The JSON object in ``content``; ``path`` is for errors."""
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def shown(value: Any) -> str:
    """``value`` for a message: on one line and short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, deep lists
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: object) -> str:
    """The message of another library's error, on one line and short; shows a name that is not printable as its repr."""
    text = " ".join(str(error).split())
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


class Keys:
    """Values of a JSON object by key, each of the type that is asked for; UserError names the file and the key.

    A key whose value is null counts as absent.
    """

    def __init__(self, path: str | Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        self.values = {key: value for key, value in values.items() if value is not None}

    def wrong(self, key: str, wanted: str) -> UserError:
        return UserError(f"{self.path}: {self.prefix}{key} must be {wanted}, it is {shown(self.values.get(key))}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(
        self, key: str, default: float | None = None, *, least: float = -math.inf, most: float = math.inf
    ) -> float:
        """A finite number."""
        value = self.values.get(key, default)
        if type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not float or not math.isfinite(value) or not least <= value <= most:
            limits = f" of at least {least:g}" * (least > -math.inf) + f" and at most {most:g}" * (most < math.inf)
            raise self.wrong(key, f"a finite number{limits}")
        return value

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def table(self, key: str) -> Keys:
        """An object inside this one; where it is absent, an empty one."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Keys(self.path, value, f"{self.prefix}{key}.")
