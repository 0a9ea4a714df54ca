"""What became of the documents: counts by source and filter, damage, and a few samples. Tallies add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..document import Document

SAMPLES = 5  # of what a filter dropped for one reason
SHOWN = ("url", "title", "language")  # of its metadata
EXCERPT = 600  # characters of a sample
PROBLEMS = 1000  # that a report lists; all are counted

Count = tuple[int, int]  # documents, characters


def add_counts(a: Count, b: Count) -> Count:
    return a[0] + b[0], a[1] + b[1]


def length_bin(characters: int) -> int:
    """The power of two that a length is below: 0 for none, 1 for 1, 2 for 2 to 3, 3 for 4 to 7."""
    return int(characters).bit_length()


def sample(document: Document, fate: str, reason: str = "") -> dict[str, Any]:
    """An excerpt of a document as ``samples.jsonl`` has it; ``fate``: "kept", or the filter that dropped it."""
    text = document.text
    more: dict[str, Any] = {key: value for key, value in document.metadata.items() if key in SHOWN}
    excerpt = text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"
    return {"fate": fate, "reason": reason, "source": document.source, "id": document.id, **more, "text": excerpt}


@dataclass
class SourceTally:
    """Of one source."""

    kinds: Counter[str] = field(default_factory=Counter)  # documents by their kind
    read: Count = (0, 0)  # before any filter
    cleaned: Count = (0, 0)  # after the filters, before duplicates are dropped
    skipped: Counter[str] = field(default_factory=Counter)  # records that are no documents, by the reason
    dropped: dict[str, dict[str, Count]] = field(default_factory=dict)  # by filter and reason
    problems: int = 0

    def drop(self, name: str, reason: str, count: Count) -> None:
        reasons = self.dropped.setdefault(name, {})
        reasons[reason] = add_counts(reasons.get(reason, (0, 0)), count)

    def add(self, other: SourceTally) -> None:
        self.kinds += other.kinds
        self.read = add_counts(self.read, other.read)
        self.cleaned = add_counts(self.cleaned, other.cleaned)
        self.skipped += other.skipped
        self.problems += other.problems
        for name, reasons in other.dropped.items():
            for reason, count in reasons.items():
                self.drop(name, reason, count)

    def to_json(self) -> dict[str, Any]:
        return {
            "kinds": dict(self.kinds),
            "read": list(self.read),
            "cleaned": list(self.cleaned),
            "skipped": dict(self.skipped.most_common()),
            "dropped": {name: {why: list(n) for why, n in reasons.items()} for name, reasons in self.dropped.items()},
            "problems": self.problems,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SourceTally:
        dropped = {
            name: {why: (n[0], n[1]) for why, n in reasons.items()} for name, reasons in values["dropped"].items()
        }
        read, cleaned = values["read"], values["cleaned"]
        return cls(
            Counter(values["kinds"]),
            (read[0], read[1]),
            (cleaned[0], cleaned[1]),
            Counter(values["skipped"]),
            dropped,
            values["problems"],
        )


@dataclass
class Tally:
    """Of all sources."""

    sources: dict[str, SourceTally] = field(default_factory=dict)
    lengths_read: Counter[int] = field(default_factory=Counter)  # documents by length_bin of their characters
    problems: list[dict[str, str]] = field(default_factory=list)  # source, where, message
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by "filter: reason"

    def source(self, name: str) -> SourceTally:
        return self.sources.setdefault(name, SourceTally())

    def problem(self, source: str, where: str, message: str) -> None:
        self.source(source).problems += 1
        if len(self.problems) < PROBLEMS:
            self.problems.append({"source": source, "where": where, "message": message})

    def read(self, document: Document) -> None:
        found, characters = self.source(document.source), len(document.text)
        found.kinds[document.kind] += 1
        found.read = add_counts(found.read, (1, characters))
        self.lengths_read[length_bin(characters)] += 1

    def clean(self, document: Document) -> None:
        found = self.source(document.source)
        found.cleaned = add_counts(found.cleaned, (1, len(document.text)))

    def drop(self, document: Document, name: str, reason: str) -> None:
        self.source(document.source).drop(name, reason, (1, len(document.text)))
        kept = self.samples.setdefault(f"{name}: {reason}", [])
        if len(kept) < SAMPLES:
            kept.append(sample(document, name, reason))

    def add(self, other: Tally) -> None:
        for name, found in other.sources.items():
            self.source(name).add(found)
        self.lengths_read += other.lengths_read
        self.problems += other.problems[: PROBLEMS - len(self.problems)]
        for key, samples in other.samples.items():
            self.add_samples(key, samples)

    def add_samples(self, key: str, samples: Iterable[dict[str, Any]]) -> None:
        kept = self.samples.setdefault(key, [])
        kept += list(samples)[: SAMPLES - len(kept)]

    def to_json(self) -> dict[str, Any]:
        return {
            "sources": {name: found.to_json() for name, found in self.sources.items()},
            "lengths_read": {str(n): count for n, count in self.lengths_read.items()},
            "problems": self.problems,
            "samples": self.samples,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        return cls(
            {name: SourceTally.from_json(found) for name, found in values["sources"].items()},
            Counter({int(n): count for n, count in values["lengths_read"].items()}),
            values["problems"],
            values["samples"],
        )
