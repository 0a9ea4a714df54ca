"""The JSON body of a request, read with care: each field of its type, and no field that nobody knows."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any, NoReturn

from ...errors import ParameterError, did_you_mean
from ...input_files import one_line, shown
from .errors import ApiError

MOST_DEPTH = 64  # of lists and objects in one another


def parse_body(content: bytes) -> dict[str, Any]:
    """The JSON object in a body; ApiError otherwise."""

    def number(text: str) -> float:
        x = float(text)
        if not math.isfinite(x):
            raise ValueError(f"{text[:20]} is not a finite number")
        return x

    try:
        body = json.loads(content.decode("utf-8"), parse_float=number, parse_constant=number)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {one_line(error)}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    _check_depth(body)
    return body


def _check_depth(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MOST_DEPTH):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return
    raise ApiError(400, f"the body is nested too deeply: more than {MOST_DEPTH} lists and objects in one another")


class Fields:
    """A JSON object, field by field; null is as good as absent. ParameterError names the field that is wrong."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self.where = where
        self._left = {name: value for name, value in values.items() if value is not None}
        self._known: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        self._known.append(name)
        return self._left.pop(name, default)

    def wrong(self, name: str, what: str) -> ParameterError:
        return ParameterError(self.where + name, f"{self.where}{name} must be {what}")

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, f"a text, it is {shown(value)}")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, f"true or false, it is {shown(value)}")
        return value

    def whole(self, name: str, default: int | None = None, *, least: int, most: int) -> int | None:
        value = self.take(name, default)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise self.wrong(name, f"a whole number from {least:,} to {most:,}, it is {shown(value)}")
        return value

    def table(self, name: str) -> Fields | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, f"an object, it is {shown(value)}")
        return Fields(value, f"{self.where}{name}.")

    def items(self, name: str) -> list[Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, f"a list, it is {shown(value)}")
        return value

    def rest(self) -> dict[str, Any]:
        """The fields that nobody has taken."""
        rest, self._left = self._left, {}
        return rest

    def ignore(self, names: Collection[str]) -> None:
        """Fields that change nothing in the answer."""
        for name in names:
            self.take(name)

    def refuse(self, name: str, *neutral: Any) -> None:
        """A field that would change the answer and is not supported, but for values that ask for nothing."""
        value = self.take(name)
        if value is not None and value not in (*neutral, [], {}, False):
            raise ParameterError(self.where + name, f"{self.where}{name} is not supported")

    def end(self) -> None:
        """No other field is left."""
        for name in self._left:
            self._unknown(name)

    def _unknown(self, name: str) -> NoReturn:
        shown_name = one_line(name)[:80]
        hint = did_you_mean(name[:80], self._known)
        hint = hint if "did you mean" in hint else ""  # the whole list would be no line
        raise ParameterError(self.where + shown_name, f"there is no field {self.where}{shown_name}{hint}")
