"""The shards of a corpus: JSON lines in zstd, one document a line."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from ...errors import UserError
from ...input_files import open_regular, read_json

REPORT = "report.json"  # written last: a corpus is complete when it is there
SAMPLES = "samples.jsonl"
VERSION = 1  # of the corpus folder


def is_corpus(folder: str | Path) -> bool:
    """Whether a folder is a corpus that ``fastllm data prepare`` wrote."""
    path = Path(folder, REPORT)
    return path.is_file() and "shards" in read_json(path, limit=2**28)


def read_report(folder: str | Path) -> dict[str, Any]:
    """The contents of report.json; UserError where the folder is no complete corpus."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no corpus {folder}: fastllm data prepare SOURCE --out {folder} makes one")
    if not (folder / REPORT).is_file():
        unfinished = (folder / "work").is_dir()
        why = "it is not finished: run fastllm data prepare again" if unfinished else "fastllm data prepare makes one"
        raise UserError(f"{folder} is no corpus, it has no {REPORT}: {why}")
    report = read_json(folder / REPORT, limit=2**28)
    if report.get("version") != VERSION or not isinstance(report.get("shards"), list):
        raise UserError(f"{folder / REPORT} was written by another version of fastllm: prepare the corpus again")
    return report


def read_corpus(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The documents of a corpus, in their order, one at a time.

    Each is a dict of ``text``, ``source``, ``kind``, ``id`` and what is known of it: ``url``, ``title``, ``date``,
    ``language``, ``language_probability``, and the figures that the filters used, by the filter's name.

    Raises:
        UserError: the folder is no complete corpus, or a shard is missing, truncated or changed.
    """
    for shard in read_report(folder)["shards"]:
        yield from map(json.loads, read_shard(Path(folder), shard))


def read_shard(folder: Path, shard: dict[str, Any]) -> Iterator[bytes]:
    """The lines of a shard as ``report.json`` lists it; UserError at its end where it is another file."""
    path = folder / shard["name"]
    digest, documents = hashlib.sha256(), 0
    for line in read_lines(path, digest):
        documents += 1
        yield line
    if documents != shard["documents"] or digest.hexdigest() != shard["sha256"]:
        raise UserError(
            f"the shard {path} is damaged: it is not the file that {REPORT} lists; prepare the corpus again"
        )


class _Hashed(io.RawIOBase):
    """A file that takes a digest of what is read."""

    def __init__(self, file: io.BufferedReader, digest: Any) -> None:
        self._file, self._digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(buffer)
        self._digest.update(memoryview(buffer)[:n])
        return n


def read_lines(path: Path, digest: Any = None) -> Iterator[bytes]:
    """The lines of a zstd file, without their ends; ``digest`` takes in the file's own bytes."""
    with open_regular(path, "the shard ") as file:
        raw: Any = file if digest is None else _Hashed(file, digest)
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        try:
            for number, line in enumerate(io.BufferedReader(reader, 2**20), start=1):
                if not line.endswith(b"\n"):
                    raise UserError(f"the shard {path} is truncated: line {number:,} has no end")
                yield line[:-1]
        except zstandard.ZstdError as error:
            raise UserError(f"the shard {path} is damaged (byte {file.tell():,} or before): {error}") from None
