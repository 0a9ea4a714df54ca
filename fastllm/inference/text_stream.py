"""The text of a request as its tokens come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..data.tokenizer import Tokenizer


class TextStream:
    """Tokens to text that may be shown: never half a character, and nothing that may turn out to be a stop text.

    Args:
        tokenizer: of the model; special tokens have no text.
        stop: texts before which the answer ends.
        skip: bytes at the beginning that the prompt has already.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip: int = 0) -> None:
        self._tokenizer, self._stop, self._skip = tokenizer, stop, skip
        self._special = tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may begin a stop text
        self.text = ""  # what was shown

    def add(self, token: int) -> tuple[str, bool]:
        """The new text, and whether a stop text ended it."""
        if token in self._special:
            return "", False
        text = self._tokenizer.token_bytes(token)[self._skip :]
        self._skip = 0
        return self._show(self._decoder.decode(text), False)

    def finish(self) -> str:
        """What was held back at the end of the answer."""
        return self._show(self._decoder.decode(b"", final=True), True)[0]

    def _show(self, text: str, last: bool) -> tuple[str, bool]:
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        keep = 0 if last or found else max((_overlap(text, stop) for stop in self._stop), default=0)
        end = min(found) if found else len(text) - keep
        text, self._held = text[:end], "" if found else text[end:]
        self.text += text
        return text, bool(found)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
