"""What a tokenizer holds, and how it splits text: ``fastllm tokenizer inspect``."""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .tokenizer import Tokenizer

LONGEST = 20  # tokens that are shown of the longest
UNUSED = 20  # and of the unused ones, those that the tokenizer learned first
GROUPS = 1000  # sources, and languages, that are told apart; what is beyond is OTHER
OTHER = "(others)"

KINDS = {
    "special": "special",
    "byte": "one byte",
    "word": "letters after a space",
    "letters": "letters",
    "digits": "digits",
    "white space": "white space",
    "punctuation": "punctuation and symbols",
    "mixed": "mixed",
    "partial": "part of a character",
    "none": "no token has this id",
}


@dataclass
class Count:
    """How much text, and how many tokens of it. ``words``: what white space parts."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0

    def add(self, other: Count) -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.characters += other.characters
        self.words += other.words
        self.tokens += other.tokens

    def figures(self) -> dict[str, Any]:
        """The counts and their ratios; 0 where there is nothing to divide by."""
        return asdict(self) | {
            "bytes_per_token": self.bytes / self.tokens if self.tokens else 0.0,
            "characters_per_token": self.characters / self.tokens if self.tokens else 0.0,
            "tokens_per_word": self.tokens / self.words if self.words else 0.0,
        }


@dataclass
class Counts:
    """Of all documents, and by source and language."""

    total: Count = field(default_factory=Count)
    by_source: dict[str, Count] = field(default_factory=dict)
    by_language: dict[str, Count] = field(default_factory=dict)

    def add(self, source: str, language: str, count: Count) -> None:
        self.total.add(count)
        for groups, name in ((self.by_source, source), (self.by_language, language)):
            known = name if name in groups or len(groups) < GROUPS else OTHER
            groups.setdefault(known, Count()).add(count)


def inspect(tokenizer: Tokenizer, documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a tokenizer, as JSON can hold them.

    Args:
        tokenizer: to look at.
        documents: to encode: each has ``text``, and may have ``source`` and ``language``. They are read once.

    Returns:
        ``vocabulary`` (size, tokens by kind, special and longest tokens), ``text`` (bytes per token, and tokens per
        word, which is called fertility; of all documents, by source and by language), and ``unused`` tokens.
    """
    counts, uses = Counts(), np.zeros(tokenizer.vocab_size, np.int64)
    waiting: deque[tuple[str, str, Count]] = deque()

    def texts() -> Iterator[str]:
        for document in documents:
            text = document["text"]
            count = Count(1, len(text.encode()), len(text), sum(1 for _ in text.split()))
            waiting.append((str(document.get("source", "")), str(document.get("language") or "unknown"), count))
            yield text

    tokens = 0
    for ids, last in tokenizer.encode_pieces(texts()):
        uses += np.bincount(ids, minlength=len(uses))
        tokens += ids.size
        if last:
            source, language, count = waiting.popleft()
            count.tokens, tokens = tokens, 0
            counts.add(source, language, count)
    kinds = [kind_of(tokenizer, token) for token in range(tokenizer.vocab_size)]
    contents = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    text_tokens = [token for token, kind in enumerate(kinds) if kind not in ("special", "none")]
    longest = sorted(text_tokens, key=lambda token: (-len(contents[token]), token))[:LONGEST]
    unused = [token for token in text_tokens if not uses[token]]

    def shown(tokens: Iterable[int]) -> list[dict[str, Any]]:
        return [{"id": t, "text": contents[t].decode(errors="replace"), "bytes": len(contents[t])} for t in tokens]

    return {
        "vocabulary": {
            "size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "end_of_text": tokenizer.eos_id,
            "kinds": {kind: number for kind in KINDS if (number := kinds.count(kind))},
            "special": shown(token for token, kind in enumerate(kinds) if kind == "special"),
            "longest": shown(longest),
        },
        "text": {
            "total": counts.total.figures(),
            "sources": _by_tokens(counts.by_source),
            "languages": _by_tokens(counts.by_language),
        },
        "unused": {"number": len(unused), "of": len(text_tokens), "first": shown(unused[:UNUSED])},
    }


def kind_of(tokenizer: Tokenizer, token: int) -> str:
    """What a token is made of: a key of KINDS."""
    if token in tokenizer.special_ids:
        return "special"
    content = tokenizer.token_bytes(token)
    if len(content) < 2:
        return "byte" if content else "none"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "partial"
    if text.isspace():
        return "white space"
    spaced, text = text[0] == " ", text.removeprefix(" ")
    groups = {unicodedata.category(c)[0] for c in text}
    if groups <= {"L", "M"}:
        return "word" if spaced else "letters"
    if groups == {"N"}:
        return "digits"
    return "punctuation" if groups <= {"P", "S"} else "mixed"


def _by_tokens(groups: dict[str, Count]) -> dict[str, dict[str, Any]]:
    return {name: count.figures() for name, count in sorted(groups.items(), key=lambda item: -item[1].tokens)}


def render(report: dict[str, Any], groups: int = 20) -> RenderableType:
    """Tables of what :func:`inspect` found; ``groups``: sources and languages in each, at most."""
    vocabulary, text, unused = report["vocabulary"], report["text"], report["unused"]
    kinds = Table("tokens", "number", "share", title=f"vocabulary: {vocabulary['size']:,}", title_justify="left")
    _right(kinds)
    for kind, number in vocabulary["kinds"].items():
        kinds.add_row(KINDS[kind], f"{number:,}", f"{number / vocabulary['size']:.1%}")
    parts: list[RenderableType] = [kinds]
    special = ", ".join(f"{token['text']} ({token['id']})" for token in vocabulary["special"])
    parts.append(Text(f"special tokens: {special or 'none'}; the text ends with {vocabulary['end_of_text']}"))
    parts.append(Text("longest: " + _listed(vocabulary["longest"])))
    if text["total"]["documents"]:
        rows = Table("text", "documents", "MB", "tokens", "bytes/token", "tokens/word", title="", title_justify="left")
        _right(rows)
        for title, figures in (
            *((f"source {_printable(name)}", f) for name, f in list(text["sources"].items())[:groups]),
            *((f"language {_printable(name)}", f) for name, f in list(text["languages"].items())[:groups]),
            ("all", text["total"]),
        ):
            rows.add_row(
                Text(title),
                f"{figures['documents']:,}",
                f"{figures['bytes'] / 1e6:,.1f}",
                f"{figures['tokens']:,}",
                f"{figures['bytes_per_token']:.2f}",
                f"{figures['tokens_per_word']:.2f}",
            )
        parts.append(rows)
        share = unused["number"] / max(unused["of"], 1)
        parts.append(Text(f"unused: {unused['number']:,} tokens ({share:.1%}): {_listed(unused['first'])}"))
    return Group(*parts)


def _right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].overflow = "fold"


def _listed(tokens: list[dict[str, Any]]) -> str:
    return " ".join(f"{token['text'][:40]!r}" + "…" * (len(token["text"]) > 40) for token in tokens) or "none"


def _printable(text: str) -> str:
    """Without what a name may send to a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
