"""An HTTP response as WARC files hold it: status, headers, and the body without its encodings."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO, cast

import zstandard

from .base import Skipped

_END = re.compile(rb"\r?\n\r?\n")
_STATUS = re.compile(rb"HTTP/[\d.]+[ \t]+(\d{3})\b")
_CHUNK = re.compile(rb"[ \t]*([0-9a-fA-F]{1,8})[^\r\n]{0,1024}\r?\n")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]  # by their names in lower case; of equal ones the last
    body: bytes

    @property
    def mime(self) -> str:
        """``text/html``; empty where the header is missing."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def charset(self) -> str | None:
        found = _CHARSET.search(self.headers.get("content-type", ""))
        return found[1] if found else None


def parse(block: bytes) -> Response:
    """A response; Skipped where ``block`` is none. Headers of HTTP/2 (``:status: 200``) are understood."""
    end = _END.search(block)
    head, body = (block[: end.start()], block[end.end() :]) if end else (block, b"")
    headers: dict[str, str] = {}
    name = ""
    for line in head.decode("latin-1").splitlines():
        if line[:1] in " \t" and name:  # the old form of a long header
            headers[name] += " " + line.strip()
            continue
        key, colon, value = line[1:].partition(":")
        name = (line[:1] + key).strip().lower() if colon else ""
        if name:
            headers[name] = value.strip()
    match = _STATUS.match(head)
    status = match[1].decode() if match else headers.get(":status", "")
    if not re.fullmatch("[1-9][0-9][0-9]", status):
        raise Skipped("not an HTTP response")
    return Response(int(status), headers, body)


def decoded_body(response: Response, limit: int) -> bytes:
    """The body without chunks and compression, of at most ``limit`` bytes.

    Many archives store bodies decoded and keep the headers: what is not encoded as they say is taken as it is.

    Raises:
        Skipped: it has more bytes, or an encoding that is not known.
    """
    body = response.body
    if "chunked" in response.headers.get("transfer-encoding", "").lower():
        body = _without_chunks(body)
    encodings = [word.strip().lower() for word in response.headers.get("content-encoding", "").split(",")]
    for encoding in reversed(list(filter(None, encodings))):
        body = _decompress(body, encoding, limit)
    if len(body) > limit:
        raise Skipped(f"page of more than {limit >> 20} MiB")
    return body


def _without_chunks(body: bytes) -> bytes:
    parts, place = [], 0
    while match := _CHUNK.match(body, place):
        size = int(match[1], 16)
        if not size:
            break
        parts.append(body[match.end() : match.end() + size])
        place = match.end() + size
        if body[place : place + 2] == b"\r\n":
            place += 2
        elif body[place : place + 1] == b"\n":
            place += 1
        elif place < len(body):  # the sizes lie: it is no chunked body, or from here on none
            return b"".join(parts) + body[place:] if len(parts) > 1 else body
    return b"".join(parts) if parts or match else body


def _decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """At most ``limit + 1`` bytes. A body that is cut gives what it has; one that is not compressed, itself."""
    if encoding in ("gzip", "x-gzip"):
        return _inflate(body, 31, limit) if body[:2] == b"\x1f\x8b" else body
    if encoding == "deflate":  # some servers send it without zlib's header
        return _inflate(body, 15, limit) or _inflate(body, -15, limit) or body
    if encoding == "zstd":
        if body[:4] != b"\x28\xb5\x2f\xfd":
            return body
        try:
            return zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body).read(limit + 1)
        except zstandard.ZstdError:
            raise Skipped("damaged content encoding") from None
    if encoding == "br":
        return _brotli(body, limit)
    if encoding in ("identity", "none", "utf-8"):
        return body
    raise Skipped("unknown content encoding")


def _inflate(body: bytes, wbits: int, limit: int) -> bytes:
    """What can be inflated: a block at a time, so that what comes before damage is not lost."""
    inflater, size = zlib.decompressobj(wbits), 0
    out: list[bytes] = []
    for start in range(0, len(body), 2**14):
        data = body[start : start + 2**14]
        while data and size <= limit and not inflater.eof:
            try:
                part = inflater.decompress(data, limit + 1 - size)
            except zlib.error:
                return b"".join(out)
            out.append(part)
            size += len(part)
            data = inflater.unconsumed_tail
    return b"".join(out)


def _brotli(body: bytes, limit: int) -> bytes:
    from fastwarc.stream_io import BrotliReader

    reader, out, size = BrotliReader(cast(BinaryIO, BytesIO(body))), [], 0
    try:
        while size <= limit and (part := reader.read(min(2**14, limit + 1 - size))):
            out.append(part)
            size += len(part)
    except (OSError, ValueError):
        if not out:  # brotli has no magic bytes: it may be a body that is not compressed
            return body
    return b"".join(out)
