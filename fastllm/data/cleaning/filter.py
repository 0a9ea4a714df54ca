"""What the settings of all filters share: two fields, and the checks of values that may come from a TOML file."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

from ...errors import UserError, did_you_mean
from ..document import Document, Kind

Judge = Callable[[Document], str]  # "" keeps the document, which it may change; else the reason for dropping it
_EXPECTED = {
    bool: "true or false", int: "a whole number, not negative", float: "a number, not negative", str: "a string",
    tuple: "a list of strings",
}  # fmt: skip


@dataclass(frozen=True)
class Filter(ABC):
    """The settings of one filter: ``enabled``, ``kinds`` (of documents that it applies to) and its thresholds.

    A field is an int, float, bool, str or tuple of str, so that a table of a TOML file can hold it.
    """

    name: ClassVar[str]
    fractions: ClassVar[tuple[str, ...]] = ()  # fields that lie between 0 and 1

    enabled: bool = True
    kinds: tuple[str, ...] = ()

    @abstractmethod
    def build(self) -> Judge:
        """The filter as a function. Only the process that built it can use it: it cannot be pickled."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, self._checked(field.name, getattr(self, field.name), field.default))
        for name in self.fractions:
            self._require(getattr(self, name) <= 1, name, "at most 1")
        for kind in self.kinds:
            if kind not in get_args(Kind):
                raise UserError(f"filters.{self.name}.kinds: no kind {kind!r}{did_you_mean(kind, get_args(Kind))}")

    def _checked(self, name: str, value: Any, default: Any) -> Any:
        """The value as the type of the field's default: TOML has lists for tuples, and 1 may stand for 1.0."""
        wanted = type(default)
        if wanted is tuple and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if wanted is float and type(value) is int:
            value = float(value)
        ok = type(value) is wanted and wanted is not tuple
        if ok and isinstance(value, int | float):
            ok = math.isfinite(value) and value >= 0
        self._require(ok, name, _EXPECTED[wanted])
        return value

    def _require(self, ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise UserError(f"filters.{self.name}.{name} must be {rule}, it is {getattr(self, name)!r}")


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures as the metadata holds them. Rules compare the exact ones."""
    return {name: round(value, 3) for name, value in figures.items()}
