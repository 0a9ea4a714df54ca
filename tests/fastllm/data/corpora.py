"""Corpora as ``fastllm data prepare`` writes them, of documents that a test makes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard

from fastllm.data.corpus.shards import REPORT, VERSION


def write_corpus(folder: Path, shards: Sequence[Sequence[dict[str, Any] | bytes]]) -> Path:
    """A complete corpus; each document has at least ``text``, or is the line that stands for it."""
    folder.mkdir(parents=True)
    listed = []
    for number, documents in enumerate(shards):
        path = folder / f"{number:05d}.jsonl.zst"
        defaults = {"source": "web", "kind": "text", "id": "0"}
        lines = [
            document if isinstance(document, bytes) else json.dumps(defaults | document, ensure_ascii=False).encode()
            for document in documents
        ]
        path.write_bytes(zstandard.ZstdCompressor().compress(b"".join(line + b"\n" for line in lines)))
        content = path.read_bytes()
        listed.append(
            {
                "name": path.name,
                "documents": len(documents),
                "characters": sum(len(document["text"]) for document in documents if isinstance(document, dict)),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    (folder / REPORT).write_text(json.dumps({"version": VERSION, "sources": [], "shards": listed}))
    return folder
