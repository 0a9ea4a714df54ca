"""Reading a source to its end, and small WARC files."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fastllm.data.document import Document
from fastllm.data.readers import ReaderOptions, Seen, Skipped, open_source


@dataclass
class Read:
    """What a source gave: documents, what was passed over, and problems as (where, message)."""

    documents: list[Document] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)

    def skipped(self, reason: str, n: int = 1) -> None:
        self.passed_over[reason] += n

    def problem(self, where: str, message: str) -> None:
        self.problems.append((where, message))

    @property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]


def read(name: str | Path, options: ReaderOptions | None = None, seen: Seen | None = None) -> Read:
    """Read as the driver does: sources and records go through a pickle."""
    found = Read()
    for source in open_source(str(name), options, seen):
        found.formats.append(source.format)
        copy = pickle.loads(pickle.dumps(source))
        for record in source.records(found):
            try:
                found.documents.append(copy.extract(pickle.loads(pickle.dumps(record))))
            except Skipped as error:
                found.skipped(pickle.loads(pickle.dumps(error)).reason)
                if error.where:
                    found.problem(error.where, error.reason)
    return found


PAGE = (
    "<html><head><title>The {0}</title></head><body><nav><a href='/'>Home</a> <a href='/x'>About us</a></nav>"
    "<main><article><h1>The {0}</h1><p>A paragraph about the {0}, long enough to be a part of the main content, "
    "with a second clause.</p><p>Another paragraph about the {0}, which says more about it than the first.</p>"
    "</article></main><footer>Copyright</footer></body></html>"
)


def response(
    body: bytes, content_type: str = "text/html; charset=utf-8", status: str = "HTTP/1.1 200 OK", headers: str = ""
) -> bytes:
    return f"{status}\r\nContent-Type: {content_type}\r\n{headers}\r\n".encode() + body


def record(
    block: bytes,
    url: str = "http://example.org/",
    kind: str = "response",
    mime: str = "application/http; msgtype=response",
    length: object = None,
) -> bytes:
    """A WARC record; ``length`` is what its header says where that is not true."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-02T03:04:05Z\r\n"
        f"Content-Type: {mime}\r\nContent-Length: {len(block) if length is None else length}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"
