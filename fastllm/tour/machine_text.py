"""Text that this machine has: Python's own documentation, and the licences of installed packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from .documents import Text

LONGEST = 10_000  # characters of a text; longer ones are cut at a line


def machine_texts(characters: int) -> Iterator[Text]:
    """Documentation and licences, half of so many characters each at most; none where the machine has none."""
    for texts in (_documentation(), _licences()):
        left = characters // 2
        for text in texts:
            content = text.paragraphs[0]
            if len(content) > left:
                break
            left -= len(content)
            yield text


def _documentation() -> Iterator[Text]:
    """The chapters of Python's reference that help() shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a Python that was packaged without it
        return
    for name in sorted(topics):
        yield Text(name, (_cut(topics[name]),))


def _licences() -> Iterator[Text]:
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")) and not file.name.endswith(".py"):
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, ValueError, TypeError):  # gone, or not UTF-8: metadata may say what is not there
                    continue
                if text.strip():
                    found[f"{distribution.name}-{file.name}"] = _cut(text)
    for name in sorted(found):
        yield Text(name, (found[name],))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition("\n")[0]
