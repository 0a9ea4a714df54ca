"""A server under load and under attack: what is too much is refused, and the rest is answered."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections import Counter
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.limits import HANG

from .conftest import Running
from .test_bodies import BODIES, JUNK

OPTIONS = ("--max-batch", 8, "--max-queue", 32, "--max-body", 1, "--max-connections", 300, "--quiet")
LONG = {"max_tokens": 1500, "ignore_eos": True}


def test_200_clients(server: Running, capsys):
    """A queue of 32: each client gets its answer, or is told at once that the server is busy."""

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        try:
            if i % 2:
                stream = await client.completions.create(
                    model="tiny", prompt=f"{i}", max_tokens=24, stream=True, extra_body={"ignore_eos": True}
                )
                chunks = [chunk async for chunk in stream]
                assert chunks[-1].choices[0].finish_reason == "length"
            else:
                answer = await client.completions.create(
                    model="tiny", prompt=f"{i}", max_tokens=24, extra_body={"ignore_eos": True}
                )
                assert answer.usage.completion_tokens == 24
        except openai.RateLimitError as error:
            return f"{error.code}, try again in {error.response.headers['retry-after']} s"
        return "answered"

    async def ask_all() -> Counter[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=HANG
        ) as client:
            return Counter(await asyncio.gather(*(ask(client, i) for i in range(200))))

    start = time.monotonic()
    counts = asyncio.run(ask_all())
    with capsys.disabled():
        print(f"\n200 clients: {dict(counts)} in {time.monotonic() - start:.1f} s")
    assert set(counts) == {"answered", "queue_full, try again in 1 s"}
    assert counts["answered"] >= 40
    server.wait_for("fastllm_pages_used", 0)
    assert server.metric("fastllm_requests_waiting") == 0
    assert server.chat().status == 200


def test_more_answers_than_the_server_takes(server: Running):
    got = server.chat(n=41)
    assert got.status == 400
    assert got.error["param"] == "n"


def test_a_client_that_does_not_read(server: Running):
    """It holds its own answer up and nobody else's."""
    body = {"prompt": "the", "n": 8, "stream": True, "logprobs": 20, **LONG, "max_tokens": 1000}
    content = json.dumps(body).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        head = "\r\n".join((*lines, f"Content-Length: {len(content)}"))
        slow.sendall(f"{head}\r\n\r\n".encode() + content)
        while server.metric("fastllm_requests_running") < 8:
            time.sleep(0.01)
        assert server.chat().status == 200
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.wait_for("fastllm_pages_used", 0)


def test_a_client_that_leaves_the_queue(server: Running):
    client = server.client()
    running = client.completions.create(model="tiny", prompt="a", n=8, stream=True, extra_body=LONG, max_tokens=1500)
    next(iter(running))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(model="tiny", prompt="a")
    server.wait_for("fastllm_requests_waiting", 0)
    assert server.metric("fastllm_requests_running") == 8
    running.close()
    server.wait_for("fastllm_pages_used", 0)


def test_large_bodies(server: Running):
    body = json.dumps({"prompt": "x" * 2**20}).encode()
    got = server.ask("POST", "/v1/completions", body)
    assert got.status == 413
    assert got.error
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", iter([body[:700_000], body[700_000:]]), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    "request_",
    [b"nonsense\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"\0" * 100,
     b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 200_000 + b"\r\n\r\n",
     b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"],
)  # fmt: skip
def test_invalid_http(server: Running, request_):
    with socket.create_connection(("127.0.0.1", server.port), timeout=HANG) as connection:
        connection.sendall(request_)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:  # of what was sent and not read
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_websocket_is_no_address(server: Running):
    got = server.ask("GET", "/v1/models", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    assert got.status == 200  # the upgrade is ignored, as HTTP has it


# Without shrinking: what one body does may depend on those before it.
@settings(
    max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=BODIES | JUNK | st.binary(max_size=20))
def test_any_body_is_answered_or_refused(server: Running, body: Any):
    for path, field in (("/v1/chat/completions", "prompt"), ("/v1/completions", "messages")):
        if isinstance(body, dict):
            body.pop(field, None)
        got = server.ask("POST", path, b"null" if body is None else body)
        assert got.status in (200, 400, 404), (body, got.body)
        if got.status != 200:
            assert got.error
