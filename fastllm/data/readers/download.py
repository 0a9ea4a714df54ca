"""Files from the web, into a folder where they are kept. What robots and rates allow is up to who lists the URLs."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from ...errors import UserError
from ...files import to_disk, write_atomic
from ...input_files import one_line
from ..folders import printable

TRIES = 5  # without a further byte, before a transfer is given up
WAIT = 1.0  # seconds before the second try; each further one waits twice as long
LONGEST_WAIT = 60.0  # seconds, whatever the server asks for
TIMEOUT = 60.0  # seconds without an answer
BLOCK = 2**20
_LATER = frozenset((408, 425, 429, 500, 502, 503, 504))  # what may work at another time
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def is_url(name: str) -> bool:
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", name) is not None


def cache_folder(cache: str | Path = "") -> Path:
    return Path(cache or os.environ.get("FASTLLM_CACHE") or Path.home() / ".cache" / "fastllm" / "downloads")


def download(url: str, cache: str | Path = "") -> Path:
    """The file at ``url``, downloaded into the folder ``cache``, or from there where it is complete already.

    A broken transfer is resumed where the server can (Range with If-Range), by a later call too. The file is complete
    by the size that the server tells, or not there.

    Raises:
        UserError: the URL is not of http or https, the server has no such file, or the transfer breaks again and again.
    """
    shown = printable(url)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"can't download {shown}: {one_line(error)}") from None
    if parts.scheme.lower() not in ("http", "https"):
        raise UserError(f"can't download {shown}: only http and https are known")
    folder = cache_folder(cache)
    name = re.sub(r"[^\w.+-]", "_", unquote(parts.path).rpartition("/")[2])[-100:] or "index"
    path = folder / f"{hashlib.blake2b(url.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()}-{name}"
    try:
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.part", "ab") as part:
            _lock(part, shown)
            if not path.exists():
                _Transfer(url, part, Path(f"{path}.json")).run()
                to_disk(Path(part.name))
                os.replace(part.name, path)
                Path(f"{path}.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"can't download {shown} into {printable(folder)}: {error.strerror or error}") from None
    return path


class _Transfer:
    def __init__(self, url: str, part: IO[bytes], known: Path) -> None:
        self._url, self._shown, self._part, self._known = url, printable(url), part, known
        self._opener = _opener()

    def run(self) -> None:
        failures = 0
        while True:
            before, wait = self._part.tell(), WAIT * 2**failures
            try:
                self._once()
                return
            except urllib.error.HTTPError as error:
                if error.code == 416:  # there is no such range: the file is another now
                    self._restart()
                elif error.code not in _LATER:
                    raise UserError(
                        f"can't download {self._shown}: HTTP status {error.code} {one_line(error.reason)}"
                    ) from None
                reason = f"HTTP status {error.code}"
                asked = error.headers.get("Retry-After", "") if error.headers else ""
                wait = float(asked) if asked.isdigit() else wait
            except _Broken as error:
                reason = str(error)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.filename == self._part.name:
                    raise
                reason = one_line(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:  # a URL that no server can have
                raise UserError(f"can't download {self._shown}: {one_line(error)}") from None
            failures = 0 if self._part.tell() > before else failures + 1
            if failures >= TRIES:
                raise UserError(
                    f"can't download {self._shown}: {reason}, {TRIES} times; {self._part.tell():,} bytes are kept, "
                    "and a later call resumes there"
                )
            time.sleep(min(wait, LONGEST_WAIT))

    def _once(self) -> None:
        """One request, from where the last one ended."""
        state = self._state()
        validator, have = state.get("validator", ""), self._part.tell()
        if have and not validator:
            self._restart()
            have = 0
        request = urllib.request.Request(self._url, headers={"User-Agent": "fastllm", "Accept-Encoding": "identity"})
        if have:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", validator)
        with self._opener.open(request, timeout=TIMEOUT) as response:
            total = self._begin(response, have)
            while block := response.read(BLOCK):
                self._write(block)
        if total is not None and self._part.tell() != total:
            have = self._part.tell()
            if have > total:
                self._restart()
            raise _Broken(f"the transfer ended after {have:,} of {total:,} bytes")

    def _begin(self, response: Any, have: int) -> int | None:
        """Check where the answer begins; returns the size of the file where it is told."""
        length = response.headers.get("Content-Length", "")
        if response.status == 206:
            match = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
            if not match or int(match[1]) != have:
                self._restart()
                raise _Broken("the server answered with another range")
            return int(match[3]) if match[3] != "*" else int(match[2]) + 1
        if response.status != 200:
            raise UserError(f"can't download {self._shown}: HTTP status {response.status}")
        self._restart()  # all of it comes again
        tag = response.headers.get("ETag", "")
        validator = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")
        write_atomic(self._known, json.dumps({"validator": validator}).encode())
        return int(length) if length.isdigit() else None

    def _write(self, block: bytes) -> None:
        try:
            self._part.write(block)
            self._part.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._part.name) from None

    def _restart(self) -> None:
        self._part.seek(0)
        self._part.truncate()

    def _state(self) -> dict[str, str]:
        try:
            state = json.loads(self._known.read_bytes())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}


class _Broken(Exception):
    """A transfer that ended too early."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise UserError(f"can't download {printable(req.full_url)}: it leads to {printable(newurl)}")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new:
            for name in ("Range", "If-Range"):
                if value := req.get_header(name.capitalize()):
                    new.add_header(name, value)
        return new


def _opener() -> urllib.request.OpenerDirector:
    """Without the handlers of other schemes: no server can lead to a file of this machine."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _lock(part: IO[bytes], shown: str) -> None:
    """Two processes must not write into one file."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process downloads {shown} at this time") from None
