"""A tiny model that chats nonsense, and servers of it in processes of their own."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import save_file

from fastllm.config import ModelConfig
from fastllm.data.tokenizer import Tokenizer
from fastllm.huggingface.export import layout
from fastllm.model.gpt import GPT
from tests.limits import HANG

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'refuse this' %}{{ raise_exception('the template refuses this') }}{% endif %}"
    "{% if m.content == 'loop forever' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 2048
HELLO = [{"role": "user", "content": "hello"}]
POISON = "§"  # the logits after a text that ends with its last byte are not finite


def write_model(folder: Path, *, template: bool = True) -> Path:
    """A Hugging Face folder of a model with random weights."""
    folder.mkdir()
    words = "the quick brown fox jumps over a lazy dog while seven wizards make toxic brew for the evil queen "
    tokenizer = Tokenizer.train([words * 20], 360, chat=True)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT, dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=48,
        tie_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT(config)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    # Two places of the residual stream are as the embedding has them: the last is 0 but for one token, whose logits
    # overflow; the one before is the same for all, and keeps that token from being chosen by chance.
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[-2:] = 0
    poison = tokenizer.encode(POISON)[-1]
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, -2], embedding[:, -1], embedding[poison, -1] = embedding.std(), 0, 100
    head *= 0.4 / head.std()
    head[:, -2:] = torch.tensor([0, 3e38])
    head[poison, -2] = -40
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(layout(config)))
    tokenizer.save(folder / "tokenizer.json")
    ends = [tokenizer.eos_id, tokenizer.backend.token_to_id("<|im_end|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    if template:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@dataclass
class Answer:
    """What a request got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which is in OpenAI's form."""
        assert self.headers["content-type"] == "application/json"
        assert list(self.json) == ["error"]
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "\n" not in error["message"]
        return error


@dataclass
class Running:
    """A server."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str]  # that it has printed at its start

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=HANG, **options)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str | None = None
    ) -> Answer:
        """A request without a library that knows the API. ``body``: bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        sent = {"Authorization": f"Bearer {key}"} if key else {}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent["Content-Type"] = "application/json"
        try:
            connection.request(method, path, body, {**sent, **(headers or {})})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, content)

    def chat(self, content: Any = "hello", **fields: Any) -> Answer:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}
        return self.ask("POST", "/v1/chat/completions", body)

    def metric(self, name: str, key: str | None = None) -> float:
        text = self.ask("GET", "/metrics", key=key).body.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
        assert found, f"there is no metric {name}"
        return float(found[1])

    def wait_for(self, name: str, value: float) -> None:
        """Until a metric has this value."""
        deadline = time.monotonic() + HANG
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}"
            time.sleep(0.01)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; exit code, standard output and standard error."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=HANG)
        return self.process.returncode, stdout, stderr


@contextmanager
def run_server(folder: Path, *options: object, environment: dict[str, str] | None = None) -> Iterator[Running]:
    """``fastllm serve`` at a free port, ready."""
    words = ["serve", folder, "--name", "tiny", "--port", 0, "--dtype", "float32", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastllm", *map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )  # fmt: skip
    try:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("chat page"):
                yield Running(process, int(line.rpartition(":")[2].strip().rstrip("/")), lines)
                break
        else:
            pytest.fail(f"the server did not start: {lines} {process.communicate(timeout=HANG)[1]}")
    finally:
        process.kill()
        process.communicate(timeout=HANG)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """A server for the tests of a module, with its OPTIONS."""
    with run_server(tiny_model, *getattr(request.module, "OPTIONS", ())) as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.client()
