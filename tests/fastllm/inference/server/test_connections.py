"""Slow clients and too many of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from fastllm.inference.server import run
from tests.limits import HANG


async def flood(scope: Any, receive: Any, send: Any) -> None:
    """An answer, at /flood more than the system holds for a client."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(2000 if scope["path"] == "/flood" else 0):
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"done"})


Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


def with_server(client: Callable[[int], Awaitable[None]], **options: Any) -> None:
    """Run a client beside a server in this process."""

    async def close(seconds: float) -> None:
        pass

    async def main() -> None:
        listener = run.bind("127.0.0.1", 0)
        service = SimpleNamespace(draining=False, busy=False, engine=SimpleNamespace(close=close))
        ready = asyncio.Event()
        most = options.get("max_connections", 10)
        serving = asyncio.create_task(
            run.serve(flood, service, listener, max_connections=most, drain=0, ready=ready.set, say=lambda _: None)
        )
        await ready.wait()
        try:
            async with asyncio.timeout(HANG):
                await client(listener.getsockname()[1])
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await serving

    asyncio.run(main())


async def ask(port: int, path: str = "/") -> tuple[bytes, Reader, Writer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return await reader.readuntil(b"\r\n\r\n"), reader, writer


def test_a_head_that_does_not_come(monkeypatch):
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)

    async def client(port: int) -> None:
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            assert await _ends(reader) == b""
        _, reader, writer = await ask(port)  # and the same at the second request of a connection
        await asyncio.sleep(0.5)
        writer.write(b"GET / HTTP/1.1\r\n")
        assert b"done" in await _ends(reader)

    with_server(client)


async def _ends(reader: Reader) -> bytes:
    with suppress(ConnectionError):
        return await reader.read()
    return b""


def read_all(connection: socket.socket) -> None:
    """To the end of the connection, which stays open after an answer."""
    with suppress(ConnectionError):
        while connection.recv(2**20):
            pass


def test_a_client_that_takes_nothing(monkeypatch):
    monkeypatch.setattr(run, "STALL_SECONDS", 0.3)

    async def client(port: int) -> None:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        slow.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(1)
        slow.settimeout(HANG)
        await asyncio.to_thread(read_all, slow)
        slow.close()

    with_server(client)


def test_too_many_connections():
    async def client(port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        head, reader, _ = await ask(port)
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after" in head.lower()
        assert json.loads(await reader.read())["error"]["code"] == "too_many_connections"
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.1)
        head, *_ = await ask(port)
        assert head.startswith(b"HTTP/1.1 200 ")

    with_server(client, max_connections=3)
