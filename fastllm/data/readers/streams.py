"""Blocks of a file, decompressed: gzip of several members, zstd of several frames, bzip2 of several streams."""

from __future__ import annotations

import bz2
import os
import re
import struct
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from ...errors import UserError
from ...input_files import one_line
from ..folders import kind_of_file
from .base import Log

BLOCK = 2**16  # bytes that are read at a time
ZSTD_BLOCK = 2**11  # of zstd, which can't bound what it returns: up to 64 MiB for these, of a bomb
OUT = 2**20  # decompressed bytes that are handed out at a time, at most
ZSTD_WINDOW = 2**27  # bytes of memory that a zstd frame may ask for; the most that the zstd tool takes by default
DICTIONARY_LIMIT = 16 * 2**20  # bytes of a zstd dictionary
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_DICTIONARY = b"\x5d\x2a\x4d\x18"  # the frame at the begin of a .warc.zst that holds the dictionary


@dataclass(frozen=True)
class Codec:
    """A compression. ``new`` makes a decompressor of one member; ``magic`` matches where a member begins."""

    name: str
    member: str
    magic: re.Pattern[bytes]
    errors: tuple[type[Exception], ...]
    new: Callable[[bytes], Any]  # the argument: a dictionary, empty but for zstd


def _new_zstd(dictionary: bytes) -> Any:
    known = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    return zstandard.ZstdDecompressor(dict_data=known, max_window_size=ZSTD_WINDOW).decompressobj()


CODECS = (
    Codec(
        "gzip", "gzip member", re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"), (zlib.error,), lambda _: zlib.decompressobj(31)
    ),
    Codec(
        "zstd",
        "zstd frame",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        (zstandard.ZstdError,),
        _new_zstd,
    ),
    Codec(
        "bzip2",
        "bzip2 stream",
        re.compile(rb"BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90)"),
        (OSError, ValueError),
        lambda _: bz2.BZ2Decompressor(),
    ),
)


class _NoLog:
    def skipped(self, reason: str, n: int = 1) -> None: ...

    def problem(self, where: str, message: str) -> None: ...


NO_LOG: Log = _NoLog()


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file. No other kind is even opened: that can wait forever, and devices may act on it.

    Raises:
        OSError: it can't be opened.
        UserError: it is no regular file.
    """
    if kind := kind_of_file(os.stat(path).st_mode):
        raise UserError(f"is a {kind}")
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # /proc/kmsg waits, too
    return open(number, "rb")


def compression(start: bytes) -> Codec | None:
    """How a file that begins with ``start`` is compressed."""
    return next((codec for codec in CODECS if codec.magic.match(start)), None)


def blocks(path: str | Path, log: Log) -> Generator[bytes | None, None, None]:
    """The content of a file, decompressed, some of it at a time; ``None`` where damage left some out.

    Damage is told to ``log``. Behind it reading goes on with the next member, frame or stream, if there is one.
    """
    try:
        with open_file(path) as file:
            codec = compression(file.read(16))
            file.seek(0)
            if codec:
                yield from _decompressed(file, codec, log)
                return
            while block := file.read(OUT):
                yield block
    except OSError as error:
        log.problem("the file", f"it can't be read: {error.strerror or error}")
        yield None


def head(path: str | Path, size: int) -> bytes:
    """The first ``size`` bytes of a file, decompressed; fewer where it is shorter or damaged."""
    found = b""
    parts = blocks(path, NO_LOG)
    for block in parts:
        found += block or b""
        if block is None or len(found) >= size:
            break
    parts.close()
    return found[:size]


def _decompressed(file: BinaryIO, codec: Codec, log: Log) -> Iterator[bytes | None]:
    reader = _Members(file, codec, _dictionary(file) if codec.name == "zstd" else b"")
    while True:
        try:
            yield from reader.blocks()
            return
        except _Damage as damage:
            log.problem(f"byte {damage.start:,}", damage.message)
            start = damage.start
        yield None
        if not reader.next_member(start + 1):
            return


class _Damage(Exception):
    def __init__(self, start: int, message: str) -> None:
        super().__init__(message)
        self.start, self.message = start, message


class _Members:
    """The members of a compressed file."""

    def __init__(self, file: BinaryIO, codec: Codec, dictionary: bytes) -> None:
        self._file, self._codec, self._dictionary = file, codec, dictionary
        self._bounded = codec.name != "zstd"
        self._block = BLOCK if self._bounded else ZSTD_BLOCK

    def blocks(self) -> Iterator[bytes]:
        """What the members from here on hold."""
        codec, data = self._codec, b""
        while True:
            data = data.lstrip(b"\0")  # zeros may pad a file
            while len(data) < 16 and (more := self._file.read(self._block)):
                data = (data + more).lstrip(b"\0")
            if not data:
                return
            start = self._file.tell() - len(data)
            if not codec.magic.match(data):
                raise _Damage(start, f"no {codec.member} begins here")
            if codec.name == "zstd" and _SKIPPABLE.match(data):
                self._file.seek(start + 8 + int.from_bytes(data[4:8], "little"))
                data = b""
                continue
            member = codec.new(self._dictionary)
            full = False  # more may come without more input
            while not member.eof:
                if not data and not full:
                    data = self._file.read(self._block)
                    if not data:
                        raise _Damage(start, f"the file ends inside the {codec.member} that begins here")
                try:
                    out = member.decompress(data, OUT) if self._bounded else member.decompress(data)
                except codec.errors as error:
                    raise _Damage(start, f"the {codec.member} that begins here is damaged: {one_line(error)}") from None
                full = self._bounded and len(out) == OUT
                data = getattr(member, "unconsumed_tail", b"") if not member.eof else b""
                for i in range(0, len(out), OUT):
                    yield out[i : i + OUT] if len(out) > OUT else out
            data = member.unused_data

    def next_member(self, place: int) -> bool:
        """Go to where the next member behind ``place`` begins, if there is one."""
        self._file.seek(place)
        kept = b""
        while block := self._file.read(2**20):
            data = kept + block
            if match := self._codec.magic.search(data):
                self._file.seek(self._file.tell() - len(data) + match.start())
                return True
            kept = data[-16:]
        return False


def _dictionary(file: BinaryIO) -> bytes:
    """The dictionary at the begin of a .warc.zst (IIPC's specification), which may be compressed itself."""
    start = file.read(8)
    content = b""
    if start[:4] == _DICTIONARY and len(start) == 8:
        size = struct.unpack("<I", start[4:])[0]
        if size <= DICTIONARY_LIMIT:
            content = file.read(size)
        if content[:4] == b"\x28\xb5\x2f\xfd":
            try:
                reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).stream_reader(content)
                content = reader.read(DICTIONARY_LIMIT)
            except zstandard.ZstdError:
                content = b""
    file.seek(0)
    return content


def lines(path: str | Path, log: Log, limit: int) -> Iterator[tuple[int, int, bytes]]:
    """``(number from 1, offset, line)`` of a file's lines, without their ends.

    Lines of more than ``limit`` bytes and those that damage cut are told to ``log`` and left out.
    """
    number, offset, kept, broken = 1, 0, bytearray(), False
    dropped = 0  # bytes of a line that is too long
    for block in blocks(path, log):
        if block is None:
            dropped += len(kept)
            kept.clear()
            broken = True
            continue
        start = 0
        while (stop := block.find(b"\n", start)) >= 0:
            size = dropped + len(kept) + stop - start
            if broken:
                log.problem(f"line {number:,}, byte {offset:,}", "the damage cut this line: it is left out")
            elif size > limit:
                log.problem(f"line {number:,}, byte {offset:,}", f"the line has {size:,} bytes: more than {limit:,}")
            else:
                yield number, offset, bytes(kept) + block[start:stop]
            kept.clear()
            number, offset, dropped, broken = number + 1, offset + size + 1, 0, False
            start = stop + 1
        kept += memoryview(block)[start:]
        if dropped + len(kept) > limit:
            dropped += len(kept)
            kept.clear()
    size = dropped + len(kept)
    if broken:
        return
    if size > limit:
        log.problem(f"line {number:,}, byte {offset:,}", f"the line has {size:,} bytes: more than {limit:,}")
    elif size:
        yield number, offset, bytes(kept)
