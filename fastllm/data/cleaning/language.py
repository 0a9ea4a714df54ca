"""Language: which one, how probable, and whether it is wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from ...errors import UserError, did_you_mean, pip_install
from ..document import Document
from .filter import Filter, Judge
from .words import sample_text


@dataclass(frozen=True)
class Language(Filter):
    """Writes ``language`` and ``language_probability`` into the metadata, and keeps the languages that are asked for.

    Detection is by py3langid (after Lui and Baldwin, "langid.py", ACL 2012) on a sample of the text: four pieces from
    its beginning to its end. It replaces a language that the source gives, so that all sources are judged alike.
    ``zxx`` is text without language. FineWeb keeps English with a probability of at least 0.65, by fastText's model.
    """

    name: ClassVar[str] = "language"
    fractions: ClassVar[tuple[str, ...]] = ("minimum",)
    kinds: tuple[str, ...] = ("web", "wiki", "book", "table")
    languages: tuple[str, ...] = ()  # codes of ISO 639-1 (of 639-3 where there is none); none: keep all
    minimum: float = 0.65  # probability of the language, where languages are named
    sample: int = 1000  # characters that are looked at

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.sample >= 100, "sample", "at least 100")
        self._require("code" not in self.kinds, "kinds", "without code, which has no language")
        for code in self.languages:
            if not re.fullmatch("[a-z]{2,3}", code):
                raise UserError(f'filters.language.languages: {code!r} is no code of ISO 639, such as "en"')

    def build(self) -> Judge:
        wanted, minimum, size = frozenset(self.languages), self.minimum, self.sample
        for code in self.languages:
            if code not in _identifier().labels:
                choices = did_you_mean(code, _identifier().labels)
                raise UserError(f"filters.language.languages: py3langid does not know {code!r}{choices}")

        def judge(document: Document) -> str:
            language, probability = _identifier().classify(sample_text(document.text, size))
            document.metadata["language"] = language
            document.metadata["language_probability"] = round(probability, 3)
            if not wanted:
                return ""
            if language not in wanted:
                return f"language: {language}"
            return "" if probability >= minimum else f"language: {language} is uncertain"

        return judge


@cache
def _identifier() -> Any:
    """The model, which takes a second to load: only where a document needs it."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(f"the language filter needs py3langid: {pip_install('data')}") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
