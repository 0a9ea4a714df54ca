"""Data sets of the Hugging Face hub by name, streamed by their own library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import UserError, require_packages
from ...input_files import one_line
from ..document import Document, Kind
from .base import Log, ReaderOptions
from .jsonl import METADATA, document_of

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?(?::([\w.\[\]%:-]+))?")


class Record(NamedTuple):
    row: int
    values: dict[str, Any]


@dataclass(frozen=True)
class HubSource:
    """``hf:OWNER/NAME``, ``hf:OWNER/NAME/CONFIG``, and behind a colon the split, which is ``train`` by default."""

    name: str
    dataset: str
    config: str | None
    split: str
    options: ReaderOptions
    kind: Kind = "table"
    format: str = "hf"

    def records(self, log: Log) -> Iterator[Record]:
        import datasets

        row = 0
        try:
            rows = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            for row, values in enumerate(rows):
                yield Record(
                    row, {key: values.get(key) for key in (self.options.text_column, *METADATA) if key in values}
                )
        except Exception as error:  # the library has no class of its own for them
            log.problem(f"row {row:,}", f"{one_line(error)}; what follows is left out")

    def extract(self, record: Record) -> Document:
        return document_of(record.values, self.options.text_column, self.name, str(record.row), f"row {record.row:,}")


def open_dataset(name: str, options: ReaderOptions) -> HubSource:
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(f"{name} names no data set: it is hf:OWNER/NAME, hf:OWNER/NAME/CONFIG or hf:OWNER/NAME:SPLIT")
    require_packages(f"reading {name}", "datasets", install="pip install datasets")
    return HubSource(name, match[1], match[2], match[3] or "train", options)
