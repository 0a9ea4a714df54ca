"""Who may ask, from where, and what every answer carries: the application without a network."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm.inference.async_engine import AsyncEngine
from fastllm.inference.engine import Engine
from fastllm.inference.load import load
from fastllm.inference.server.app import make_app
from fastllm.inference.server.bodies import Model
from fastllm.inference.server.gate import Access, Record
from fastllm.inference.server.service import Service
from fastllm.serving_commands import served_model

from .conftest import Answer

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine(*load(tiny_model), max_batch=4)


@pytest.fixture
def model(engine: Engine) -> Model:
    return served_model(engine, "tiny")


@pytest.fixture
def ask_as(engine: Engine, model: Model) -> Callable[..., Ask]:
    """A client of an application with some Access; ``parts`` are what arrives of the body."""

    def ask_as(access: Access, log: list[Record] | None = None, **options: Any) -> Ask:
        options = {"max_body": 10_000, "timeout": 60, **options}

        def ask(
            method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, *,
            parts: list[bytes] | None = None,
        ) -> Answer:  # fmt: skip
            sent = {"host": "127.0.0.1:8000"}
            if body is not None:
                parts = [json.dumps(body).encode()]
                sent["content-type"] = "application/json"
            sent |= {name.lower(): value for name, value in (headers or {}).items()}
            return asyncio.run(_call(method, path, sent, parts or [b""]))

        async def _call(method: str, path: str, headers: dict[str, str], parts: list[bytes]) -> Answer:
            running = AsyncEngine(engine)
            service = Service(running, model, max_queue=8)
            app = make_app(service, access, log=(lambda _: None) if log is None else log.append, **options)
            messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
            messages[-1]["more_body"] = False
            sent: list[Any] = []

            async def receive() -> Any:
                if messages:
                    return messages.pop(0)
                return await asyncio.Event().wait()

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {
                "type": "http", "method": method, "path": path, "query_string": b"", "client": ("1.2.3.4", 5),
                "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
            }  # fmt: skip
            try:
                await app(scope, receive, send)
            finally:
                await running.close()
            received = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
            return Answer(sent[0]["status"], received, b"".join(part.get("body", b"") for part in sent[1:]))

        return ask

    return ask_as


def test_key(ask_as):
    ask = ask_as(Access(key=b"sesame"))
    for header in (None, "Bearer", "Bearer wrong", "Basic sesame", "Bearer ses\u00e4me", "Bearer sesame2", "sesame"):
        for path in ("/v1/models", "/metrics", "/v1/models/tiny", "/v1/nothing", "/v1"):
            got = ask("GET", path, headers={} if header is None else {"Authorization": header})
            assert got.status == 401, (header, path)
            assert got.headers["www-authenticate"] == "Bearer"
            assert got.error["code"] == "invalid_api_key"
            assert "sesame" not in got.error["message"]
    right = {"Authorization": "Bearer sesame"}
    assert ask("GET", "/v1/models", headers=right).status == 200
    assert ask("GET", "/metrics", headers={"authorization": "bearer  sesame"}).status == 200
    assert ask("POST", "/v1/chat/completions", HELLO, right).status == 200
    assert ask("POST", "/v1/chat/completions", HELLO).status == 401
    assert ask("GET", "/").status == 200
    assert ask("GET", "/health").json == {"status": "ok"}


def test_host(ask_as):
    ask = ask_as(Access())
    for host in ("127.0.0.1", "127.0.0.1:80", "localhost:8000", "LOCALHOST", "[::1]:8000", "[::1]", "a.localhost:1"):
        assert ask("GET", "/health", headers={"host": host}).status == 200, host
    for host in (
        "example.org",
        "example.org:8000",
        "127.0.0.1.example.org",
        "",
        "localhost.example.org",
        "192.168.0.1",
    ):
        got = ask("GET", "/v1/models", headers={"host": host})
        assert got.status == 403, host
        assert got.error["code"] == "unknown_host"
    assert ask_as(Access(hosts=None))("GET", "/health", headers={"host": "example.org"}).status == 200


def test_pages_elsewhere(ask_as):
    ask = ask_as(Access())
    for origin in ("https://example.org", "null", "http://127.0.0.1:8001", "http://localhost:8000"):
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("OPTIONS", "/v1/models")):
            got = ask(method, path, HELLO if method == "POST" else None, {"Origin": origin})
            assert got.status == 403, origin
            assert got.error["code"] == "unknown_origin"
            assert "access-control-allow-origin" not in got.headers
    assert ask("POST", "/v1/chat/completions", HELLO, {"Origin": "http://127.0.0.1:8000"}).status == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        got = ask("POST", "/v1/completions", {"prompt": "a"}, {"Content-Type": kind})
        assert (got.status, got.error["type"]) == (415, "invalid_request_error")
    assert (
        ask("POST", "/v1/completions", {"prompt": "a"}, {"Content-Type": "Application/JSON; charset=utf-8"}).status
        == 200
    )


def test_allowed_origins(ask_as):
    ask = ask_as(Access(key=b"k", origins=frozenset({"https://example.org"})))
    origin = {"Origin": "https://example.org"}
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-a"}
    got = ask("OPTIONS", "/v1/chat/completions", headers=asked)
    # Browsers send a preflight without the key.
    assert got.status == 204
    assert got.headers["access-control-allow-headers"] == "authorization,x-a"
    assert "POST" in got.headers["access-control-allow-methods"]
    got = ask("POST", "/v1/chat/completions", HELLO, {**origin, "Authorization": "Bearer k"})
    assert got.status == 200
    assert got.headers["access-control-allow-origin"] == "https://example.org"
    assert got.headers["vary"] == "Origin"
    got = ask("GET", "/v1/models", headers=origin)
    assert (got.status, got.headers["access-control-allow-origin"]) == (401, "https://example.org")
    assert ask("GET", "/v1/models", headers={"Origin": "https://example.com"}).status == 403
    anyone = ask_as(Access(origins=frozenset("*")))
    assert (
        anyone("GET", "/v1/models", headers={"Origin": "https://a.b"}).headers["access-control-allow-origin"]
        == "https://a.b"
    )


def test_page(ask_as):
    got = ask_as(Access(key=b"k"))("GET", "/")
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in got.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        codes = re.findall(f"<{kind}>(.*?)</{kind}>".encode(), got.body, re.S)
        assert len(codes) == len(re.findall(f"<{kind}[ >]".encode(), got.body))
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(code).digest()).decode()}'" for code in codes]
        assert policy[f"{kind}-src"] == (" ".join(hashes) or "'none'")
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["referrer-policy"] == "no-referrer"
    assert got.headers["cache-control"] == "no-cache"
    again = ask_as(Access())("GET", "/", headers={"If-None-Match": got.headers["etag"]})
    assert (again.status, again.body) == (304, b"")


def test_headers_of_the_api(ask_as):
    ask = ask_as(Access())
    for got in (ask("GET", "/v1/models"), ask("GET", "/nothing"), ask("POST", "/v1/completions", {"prompt": 1})):
        assert got.headers["x-content-type-options"] == "nosniff"
        assert got.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in got.headers["content-security-policy"]


def test_addresses(ask_as):
    ask = ask_as(Access())
    for path in (
        "/nothing",
        "/v1",
        "/v1/",
        "/v1/chat/completions/",
        "/v1/embeddings",
        "/../etc/passwd",
        "//",
        "/\ufffd",
    ):
        assert ask("GET", path).status == 404, path
        assert ask("GET", path).error["type"] == "invalid_request_error"
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/completions", "POST"), ("PUT", "/", "GET, HEAD"),
        ("OPTIONS", "/v1/models", "GET, HEAD"),
    ):  # fmt: skip
        got = ask(method, path)
        assert got.status == 405
        assert got.error
        assert set(got.headers["allow"].split(", ")) == set(allowed.split(", "))
    assert ask("GET", "/v1/models/a/b").error["code"] == "model_not_found"
    assert ask("HEAD", "/health").status == 200


def test_large_bodies(ask_as):
    ask = ask_as(Access(), max_body=1000)
    headers = {"Content-Type": "application/json"}
    for length in ("1001", "9" * 30, "-1", "x"):
        got = ask("POST", "/v1/completions", headers={**headers, "Content-Length": length}, parts=[b"{}"])
        assert got.status == 413
        assert got.error["code"] == "body_too_large"
    assert ask("POST", "/v1/completions", headers=headers, parts=[b" " * 600, b" " * 600, b"{}"]).status == 413
    assert ask("POST", "/v1/completions", headers=headers, parts=[b" " * 600, b'{"prompt": "a"}']).status == 200


def test_log_has_no_text(ask_as):
    log: list[Record] = []
    ask = ask_as(Access(), log)
    secret = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 3}
    assert ask("POST", "/v1/chat/completions", secret).status == 200
    assert ask("POST", "/v1/chat/completions", {**secret, "temperature": "my secret"}).status == 400
    assert ask("GET", "/nothing").status == 404
    assert [record.status for record in log] == [200, 400, 404]
    assert log[0].tokens["generated"] >= 1
    assert log[0].client == "1.2.3.4"
    assert "secret" not in repr(log)


def test_a_fault_of_ours(ask_as, monkeypatch, capsys):
    """An exception that nobody expects: status 500, in OpenAI's form, and the traceback in the log alone."""

    def fail(*_: Any) -> None:
        raise KeyError("internal detail")

    monkeypatch.setattr("fastllm.inference.server.app.parse_body", fail)
    got = ask_as(Access())("POST", "/v1/completions", {"prompt": "a"})
    assert got.status == 500
    assert "internal detail" not in got.error["message"]
    assert "internal detail" in capsys.readouterr().err


def test_a_fault_of_the_engine(ask_as, engine, monkeypatch, capsys):
    """In the middle of a stream."""
    steps = iter(range(3))

    def step() -> Any:
        if next(steps, None) is None:
            raise KeyError("internal detail")
        return Engine.step(engine)

    monkeypatch.setattr(engine, "step", step)
    bias = {str(engine.tokenizer.encode("b")[0]): 100}  # no token is half a character, which would wait
    body = {"prompt": "a", "stream": True, "ignore_eos": True, "logit_bias": bias}
    got = ask_as(Access())("POST", "/v1/completions", body)
    *parts, last = got.body.decode().strip().split("\n\n")
    assert len(parts) == 3
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "internal detail" not in last
    assert "internal detail" in capsys.readouterr().err


def test_time_is_limited(ask_as):
    ask = ask_as(Access(), timeout=0.05)
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}
    got = ask("POST", "/v1/completions", body)
    assert got.status == 504
    assert got.error["code"] == "timeout"
    got = ask("POST", "/v1/completions", {**body, "stream": True})
    if got.status == 200:  # some of it was in time
        *_, last = got.body.decode().strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    else:
        assert got.status == 504
