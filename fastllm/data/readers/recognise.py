"""Which reader a file, a folder, a URL or a data set needs, by its content."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from ...errors import UserError
from ...input_files import one_line
from ..folders import TEXT_SUFFIXES, LeftOut, model_files, printable, text_files
from . import epub, gutenberg, html, hub, mediawiki, parquet, text, warc
from .base import ReaderOptions, Source
from .download import download, is_url
from .jsonl import JsonlSource
from .streams import NO_LOG, blocks, compression, head, open_file
from .text import CODE_SUFFIXES, NotText, TextSource

HEAD = 2**16  # decompressed bytes by which a file is recognised
COMPRESSED_SUFFIXES = frozenset((".gz", ".zst", ".zstd", ".bz2"))
DATA_SUFFIXES = COMPRESSED_SUFFIXES | {".warc", ".wet", ".epub", ".parquet", ".ndjson", ".htm"}
_MEDIAWIKI = re.compile(rb"<mediawiki[\s>]")
_WET = re.compile(rb"^WARC-Type:[ \t]*conversion\b", re.MULTILINE | re.IGNORECASE)
_HTTP_RECORD = re.compile(rb"^WARC-Type:[ \t]*(?:response|request|revisit)\b", re.MULTILINE | re.IGNORECASE)
_MARKUP = frozenset((".txt", ".text", ".htm", ".html", ""))  # of the books of Project Gutenberg


class Seen:
    """The files that were opened, each once, and what was left out in folders."""

    def __init__(self) -> None:
        self.left_out = LeftOut()
        self._files: set[tuple[int, int]] = set()
        self._sizes: dict[int, list[str]] = {}
        self._digests: dict[str, bytes] = {}

    def again(self, path: str) -> bool:
        """Whether a file was opened before, under this name or another, or one of the same content."""
        with open_file(path) as file:
            status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        if identity in self._files:
            return True
        self._files.add(identity)
        others = self._sizes.setdefault(status.st_size, [])
        same = bool(others) and any(self._digest(path) == self._digest(other) for other in others)
        if not same:
            others.append(path)
        return same

    def _digest(self, path: str) -> bytes:
        if path not in self._digests:
            with open_file(path) as file:
                self._digests[path] = hashlib.file_digest(file, "blake2b").digest()
        return self._digests[path]


def open_source(name: str, options: ReaderOptions | None = None, seen: Seen | None = None) -> list[Source]:
    """What can be read under ``name``: a file, the files of a folder, a URL, or ``hf:OWNER/NAME``.

    Args:
        seen: shared between calls, so that a file that is named twice counts once; tells what was left out.

    Raises:
        UserError: there is nothing that can be read.
    """
    options, seen = options or ReaderOptions(), seen or Seen()
    if not name:
        raise UserError("the name of a data file is empty")
    if name.startswith(hub.PREFIX):
        return [hub.open_dataset(name, options)]
    path, shown = (str(download(name, options.cache)) if is_url(name) else name), printable(name)
    try:
        names = os.listdir(path) if os.path.isdir(path) else None
        found = None if names is not None or seen.again(path) else _recognise(path, shown, options, named=True)
    except UserError as error:
        raise UserError(f"the data file {shown} {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        what = "folder" if os.path.isdir(path) else "file"
        raise UserError(f"can't read the data {what} {shown}: {reason}") from None
    if names is not None:
        return _folder(Path(path), names, options, seen)
    return [found] if found else []


def _folder(folder: Path, names: list[str], options: ReaderOptions, seen: Seen) -> list[Source]:
    shown = printable(folder)
    if found := model_files(names):
        raise UserError(f"{shown} is a run or model folder, not text to train on: it has {', '.join(found[:3])}")
    sources: list[Source] = []
    files = list(text_files(folder, seen.left_out, TEXT_SUFFIXES | DATA_SUFFIXES))
    for file in files:
        try:
            if not seen.again(str(file)) and (source := _recognise(str(file), printable(file), options, named=False)):
                sources.append(source)
        except UserError as error:
            seen.left_out.add(str(error).partition(":")[0].removeprefix("is "), file)
        except OSError:
            seen.left_out.add("files that can't be read", file)
    if not files:
        left_out = str(seen.left_out)
        raise UserError(
            f"the folder {shown} has no files that can be read (of the suffixes .txt, .md, .py, .jsonl, .warc.gz and "
            "the like)" + (f"; left out: {left_out}" if left_out else "")
        )
    return sources


def _recognise(path: str, name: str, options: ReaderOptions, named: bool) -> Source | None:
    """The source that a file is; UserError, which goes on after the file's name, where it is none."""
    with open_file(path) as file:
        start = file.read(16)
        if start.startswith(b"PK\x03\x04"):
            file.seek(0)
            html.require()
            if epub.check(file):
                return epub.EpubSource(name, path, options)
            raise UserError("is a zip file: unpack it")
    if start.startswith(b"PAR1"):
        parquet.check(path, options.text_column)
        return parquet.ParquetSource(name, path, options)
    suffix = _suffix(path)
    content = head(path, HEAD).removeprefix(b"\xef\xbb\xbf")
    if not content.strip() and not compression(start) and os.path.getsize(path) <= HEAD:
        if named:
            raise NotText("is empty")
        return None
    if content.startswith(b"WARC/"):
        html.require()
        wet = _WET.search(content) and not _HTTP_RECORD.search(content)
        return warc.WarcSource(name, path, options, "wet" if wet else "warc")
    if content.lstrip().startswith(b"<") and _MEDIAWIKI.search(content):
        mediawiki.require()
        return mediawiki.MediaWikiSource(name, path, options)
    if _is_jsonl(content, suffix, options.text_column, named):
        return JsonlSource(name, path, options)
    if suffix in _MARKUP and gutenberg.MARK.search(content):
        html.require()
        return gutenberg.GutenbergSource(name, path, options)
    text.check_encoding(content)
    if compression(start) and suffix not in TEXT_SUFFIXES and not named:
        raise UserError("is compressed, and not of a known format")
    if named:  # of a folder's files each is told when it is read
        for _ in text.decoded(blocks(path, NO_LOG)):
            pass
    return TextSource(name, path, options, "code" if suffix in CODE_SUFFIXES else "text")


def _suffix(path: str) -> str:
    """The suffix in lower case, without that of a compression before it."""
    found = [part.lower() for part in Path(path).suffixes[-2:]]
    while found and found[-1] in COMPRESSED_SUFFIXES:
        found.pop()
    return found[-1] if found else ""


def _is_jsonl(content: bytes, suffix: str, column: str, named: bool) -> bool:
    """Whether lines of JSON objects with a text begin here. A named .jsonl file without it is an error."""
    lines = content.lstrip().split(b"\n")
    if not lines[0].startswith(b"{"):
        return False
    known = suffix in (".jsonl", ".ndjson")
    try:
        values = json.loads(lines[0])
    except (ValueError, RecursionError):
        return known  # a long line, or a damaged one
    if isinstance(values, dict) and isinstance(values.get(column), str | None) and column in values:
        return True
    if known and named and isinstance(values, dict):
        keys = ", ".join(map(one_line, list(values)[:10]))
        raise UserError(f"has no text {column!r} in its first line: its keys are {keys}; name the one of the text")
    return False
