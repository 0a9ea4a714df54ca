"""A document: the unit that readers make, filters judge, shards hold and a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["web", "wiki", "book", "table", "text", "code"]


@dataclass
class Document:
    """A text and where it comes from. Its fields are those of a line of a corpus shard.

    Attributes:
        text: the text.
        source: the file, URL or data set that it was read from, as the user named it.
        kind: what the source holds, which decides the filters that apply: ``web`` (WARC, WET), ``wiki``, ``book``,
            ``table`` (JSONL, Parquet), ``text`` or ``code``.
        id: names the document in its source: the offset, number or name of its record.
        metadata: what is known of it, as JSON can hold it: ``url``, ``title``, ``date`` (ISO 8601), ``language`` (ISO
            639-1), ``language_probability``, and the figures that the filters used, by the filter's name.
    """

    text: str
    source: str
    kind: Kind
    id: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One flat object: ``text``, ``source``, ``kind``, ``id`` and the metadata."""
        return {"text": self.text, "source": self.source, "kind": self.kind, "id": self.id, **self.metadata}
