"""How a server starts, ends, and fails to start."""

from __future__ import annotations

import errno
import signal
import socket
import sys
import threading
import time
from typing import Any

import openai
import pytest

from fastllm.cli import main
from tests.limits import HANG

from .conftest import HELLO, Running, run_server, write_model

LONG: dict[str, Any] = {"model": "tiny", "prompt": "the", "extra_body": {"ignore_eos": True}}


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which ``fastllm serve`` refuses to start."""
    capsys.readouterr()
    assert main(["serve", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastllm: error: ")
    return line


def test_help_fits_a_screen(capsys):
    assert main(["serve", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 110


def test_what_can_not_be_served(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FASTLLM_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in error_of(capsys, tiny_model, "--port", port)
    assert "nowhere" in error_of(capsys, tmp_path / "nowhere", "--port", 0)
    assert "no host" in error_of(capsys, tiny_model, "--host", "no.such.host.invalid", "--no-key")
    assert "is no address of this machine" in error_of(capsys, tiny_model, "--host", "192.0.2.1", "--no-key")
    assert "--api-key-file" in error_of(capsys, tiny_model, "--host", "0.0.0.0")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("one\ntwo\n")
    for name in ("empty", "two"):
        assert "one API key" in error_of(capsys, tiny_model, "--api-key-file", tmp_path / name)
    assert "can't read the API key" in error_of(capsys, tiny_model, "--api-key-file", tmp_path / "missing")
    monkeypatch.setenv("FASTLLM_API_KEY", "k")
    assert "two API keys" in error_of(capsys, tiny_model, "--api-key-file", tmp_path / "two")
    monkeypatch.delenv("FASTLLM_API_KEY")
    for option, value in (("--port", 70000), ("--timeout", 0), ("--timeout", "nan"), ("--max-queue", -1),
                          ("--max-body", 0), ("--drain", "inf"), ("--max-connections", 0)):  # fmt: skip
        assert option in error_of(capsys, tiny_model, option, value)


def test_a_port_without_permission(tiny_model, capsys, monkeypatch):
    def bind(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)  # root may use any port
    assert "no permission to serve at port 80" in error_of(capsys, tiny_model, "--port", 80)


def test_a_missing_package(tiny_model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "fastllm-kernels[serve]"' in error_of(capsys, tiny_model)


class Asking(threading.Thread):
    """A request that takes a while, in a thread."""

    def __init__(self, server: Running, key: str = "none", **options: Any) -> None:
        super().__init__()
        self.client, self.options, self.result = server.client(key), options, None
        self.start()

    def run(self) -> None:
        try:
            answer = self.client.completions.create(**{**LONG, **self.options})
            self.result = list(answer) if self.options.get("stream") else answer
        except openai.APIError as error:
            self.result = error


def test_sigterm_lets_answers_end(tiny_model):
    with run_server(tiny_model, "--quiet") as server:
        asking = [Asking(server, max_tokens=1500), Asking(server, max_tokens=1500, stream=True)]
        while server.metric("fastllm_requests_running") < 2:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while server.ask("GET", "/health").status != 503:
            time.sleep(0.01)
        refused = server.chat()
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        for thread in asking:
            thread.join(HANG)
        assert asking[0].result.usage.completion_tokens == 1500
        assert asking[1].result[-1].choices[0].finish_reason == "length"
        code, stdout, stderr = server.end()
    assert (code, stderr) == (0, "")
    assert "ending" in stdout


def test_a_server_that_lacks_what_others_have(tmp_path):
    """A model without a chat template, asked with a key; the drain is short."""
    folder = write_model(tmp_path / "tiny", template=False)
    key = tmp_path / "key"
    key.write_text("sesame\n")
    with run_server(folder, "--api-key-file", key, "--speculate", 3, "--drain", 0.1) as server:
        with pytest.raises(openai.AuthenticationError) as denied:
            server.client("wrong").models.list()
        assert denied.value.code == "invalid_api_key"
        client = server.client("sesame")
        assert client.completions.create(model="tiny", prompt="the", max_tokens=3).usage.completion_tokens
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert error.value.param == "messages"
        assert "no chat template" in error.value.message
        assert server.ask("GET", "/health").status == 200
        assert server.ask("GET", "/").status == 200
        assert server.ask("GET", "/metrics").status == 401
        asking = [Asking(server, "sesame", stream=stream, max_tokens=2000) for stream in (False, True)]
        while server.metric("fastllm_requests_running", key="sesame") < 2:
            time.sleep(0.01)
        code, stdout, stderr = server.stop(signal.SIGINT)
        for thread in asking:
            thread.join(HANG)
    assert (code, stderr) == (0, "")
    assert isinstance(asking[0].result, openai.InternalServerError)
    assert asking[0].result.status_code == 503
    assert isinstance(asking[1].result, openai.APIError)
    assert "shutting down" in str(asking[1].result)
    lines = "".join([*server.lines, stdout])
    assert "has no chat template" in lines
    assert "sesame" not in lines
    assert "POST /v1/completions 200 prompt=" in lines


def test_a_second_signal_does_not_wait(tiny_model):
    with run_server(tiny_model, "--quiet") as server:
        asking = Asking(server, max_tokens=2000)
        while server.metric("fastllm_requests_running") < 1:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while server.ask("GET", "/health").status != 503:
            time.sleep(0.01)
        code, *_ = server.stop()
        asking.join(HANG)
    assert code == -signal.SIGTERM
    assert isinstance(asking.result, openai.APIConnectionError)
