"""Downloads from a server of this machine that breaks transfers."""

from __future__ import annotations

import gzip
import http.server
import os
import threading
from contextlib import contextmanager

import pytest

from fastllm.data.readers import ReaderOptions, download
from fastllm.errors import UserError

from .reading import read

BODY = os.urandom(300_000).hex().encode()


class Server(http.server.ThreadingHTTPServer):
    """What it does with each request is in ``plan``, one entry a request; the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.plan, self.requests = BODY, '"one"', [""], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        server.requests.append(dict(self.headers))
        do = server.plan.pop(0) if len(server.plan) > 1 else server.plan[0]
        if do.isdigit():
            self.send_response(int(do))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if do.startswith("to "):
            self.send_response(302)
            self.send_header("Location", do[3:])
            self.end_headers()
            return
        start = 0
        if (asked := self.headers.get("Range")) and do != "whole":
            same = self.headers.get("If-Range") == server.etag
            start = int(asked.removeprefix("bytes=").rstrip("-")) if same else 0
        if start >= len(server.body):
            self.send_response(416)
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if start:
            shown = start + 1 if do == "shifted" else start
            self.send_header("Content-Range", f"bytes {shown}-{len(server.body) - 1}/{len(server.body)}")
        rest = server.body[start:]
        if do != "unsized":
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[:100_000] if do == "break" else rest)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.001)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def fails(words: str):
    with pytest.raises(UserError) as error:
        yield
    assert words in str(error.value) and "\n" not in str(error.value)


def ranges(server: Server) -> list[str | None]:
    return [headers.get("Range") for headers in server.requests]


def test_a_file_is_downloaded_once(server, tmp_path):
    path = download.download(f"{server.url}/a%20b/c.txt?x=1", tmp_path)
    assert path.read_bytes() == BODY and path.name.endswith("-c.txt") and path.parent == tmp_path
    assert download.download(f"{server.url}/a%20b/c.txt?x=1", tmp_path) == path
    assert len(server.requests) == 1
    assert os.listdir(tmp_path) == [path.name]
    assert download.download(f"{server.url}/c.txt", tmp_path) != path


def test_a_broken_transfer_is_resumed(server, tmp_path):
    server.plan = ["break", "break", "503", "break", ""]
    assert download.download(f"{server.url}/a", tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, *(f"bytes={100_000 * n}-" for n in (1, 2, 2, 3))]
    assert server.requests[1]["If-Range"] == '"one"'


def test_a_later_call_resumes(server, tmp_path):
    server.plan = ["break", "500"]
    with fails("HTTP status 500, 5 times; 100,000 bytes are kept"):
        download.download(f"{server.url}/a", tmp_path)
    server.plan, server.requests = [""], []
    assert download.download(f"{server.url}/a", tmp_path).read_bytes() == BODY
    assert ranges(server) == ["bytes=100000-"]


def test_a_file_that_changed_comes_whole(server, tmp_path):
    server.plan = ["break", "404"]
    with fails("HTTP status 404"):
        download.download(f"{server.url}/a", tmp_path)
    server.plan, server.body, server.etag = [""], b"another", '"two"'
    assert download.download(f"{server.url}/a", tmp_path).read_bytes() == b"another"


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_tag_a_transfer_starts_again(etag, server, tmp_path):
    server.etag, server.plan = etag, ["break", ""]
    assert download.download(f"{server.url}/a", tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, None]


def test_servers_that_answer_with_another_range(server, tmp_path):
    server.plan = ["break", "shifted", "whole"]
    assert download.download(f"{server.url}/a", tmp_path).read_bytes() == BODY
    server.plan = ["unsized"]
    assert download.download(f"{server.url}/b", tmp_path).read_bytes() == BODY


def test_a_transfer_that_always_breaks(server, tmp_path):
    server.plan, server.etag = ["break"], ""
    with fails("the transfer ended after 100,000 of 600,000 bytes, 5 times"):
        download.download(f"{server.url}/a", tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith("-a")]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://x"])
def test_other_schemes(target, server, tmp_path):
    server.plan = [f"to {target}"]
    with fails(target):
        download.download(f"{server.url}/a", tmp_path)
    with fails("only http and https"):
        download.download(target, tmp_path)


def test_redirects_and_errors(server, tmp_path):
    server.plan = ["to /b", ""]
    assert download.download(f"{server.url}/a", tmp_path).read_bytes() == BODY
    for code in ("401", "403", "404", "410"):
        server.plan = [code]
        with fails(f"HTTP status {code}"):
            download.download(f"{server.url}/{code}", tmp_path)
    server.plan = ["to /loop"]
    with fails("HTTP status 302"):
        download.download(f"{server.url}/loop", tmp_path)
    port = server.server_address[1]
    for name in (f"http://127.0.0.1:{port}0000/x", "http:///x", "http://127.0.0.1:1/x", "http://[::1/x", "http://a b/"):
        with fails("can't download"):
            download.download(name, tmp_path)
    (tmp_path / "file").write_text("")
    with fails("can't download"):
        download.download(f"{server.url}/a", tmp_path / "file")


def test_a_url_as_a_source(server, tmp_path, monkeypatch):
    server.body = gzip.compress(b'{"text": "from afar"}\n')
    found = read(f"{server.url}/x", ReaderOptions(cache=str(tmp_path)))
    assert found.formats == ["jsonl"] and found.texts == ["from afar"]
    assert found.documents[0].source == f"{server.url}/x"
    monkeypatch.setenv("FASTLLM_CACHE", str(tmp_path / "other"))
    assert read(f"{server.url}/x").texts == ["from afar"]
    assert len(os.listdir(tmp_path / "other")) == 1
