"""The filters that clean a document, in the order in which they run.

Each is a frozen dataclass of settings: where its rules are from, their thresholds, the kinds of documents that it
applies to. A recipe changes them in TOML:

    [filters.gopher]
    min_words = 30
    [filters.c4]
    enabled = false
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args

from ...errors import UserError, did_you_mean
from ..document import Document, Kind
from .c4 import C4
from .filter import Filter, Judge
from .fineweb import FineWeb
from .gopher import Gopher
from .language import Language
from .normalisation import Normalisation
from .personal import Personal
from .repetition import Repetition

__all__ = [
    "C4", "FILTERS", "Filter", "FineWeb", "Gopher", "Language", "Normalisation", "Personal", "Repetition", "build",
    "settings",
]  # fmt: skip

FILTERS: dict[str, type[Filter]] = {
    cls.name: cls for cls in (Normalisation, Language, Gopher, C4, FineWeb, Repetition, Personal)
}


def settings(filters: Mapping[str, Any]) -> dict[str, Filter]:
    """The settings of all filters, in their order, from the tables of a recipe: ``{"gopher": {"min_words": 30}}``.

    A value may also be settings that are made. A filter that is not named has its defaults.
    """
    for name in filters:
        if name not in FILTERS:
            raise UserError(f"filters: no filter {name!r}{did_you_mean(name, FILTERS)}")
    return {name: _settings(cls, filters.get(name, {})) for name, cls in FILTERS.items()}


def _settings(cls: type[Filter], values: Any) -> Filter:
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"filters.{cls.name} must be a table: write [filters.{cls.name}] above its keys")
    names = [field.name for field in fields(cls)]
    for name in values:
        if name not in names:
            raise UserError(f"filters.{cls.name}: unknown key {name!r}{did_you_mean(name, names)}")
    return cls(**values)


def build(filters: Mapping[str, Any]) -> Callable[[Document], tuple[str, str] | None]:
    """All filters as one function, which runs those that are enabled for the kind of a document.

    It changes the document and gives the filter that drops it and the reason, or None where it is kept. It cannot be
    pickled: each worker process builds its own.
    """
    chosen = [one for one in settings(filters).values() if one.enabled]
    judges = {one.name: one.build() for one in chosen}
    by_kind: dict[str, list[tuple[str, Judge]]] = {
        kind: [(one.name, judges[one.name]) for one in chosen if kind in one.kinds] for kind in get_args(Kind)
    }

    def clean(document: Document) -> tuple[str, str] | None:
        for name, judge in by_kind[document.kind]:
            reason = judge(document)
            if reason:
                return name, reason
        return None

    return clean
