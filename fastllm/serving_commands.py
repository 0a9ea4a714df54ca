"""The command that serves a model: ``fastllm serve``."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import arguments, console
from .errors import UserError, pip_install, require_packages
from .inference_commands import EngineArguments, make_engine, note_early_end
from .input_files import open_regular

if TYPE_CHECKING:
    from .inference.engine import Engine
    from .inference.server.bodies import Model
    from .inference.server.gate import Access, Record

PACKAGES = ("jinja2", "llguidance", "prometheus_client", "starlette", "uvicorn")
KEY_VARIABLE = "FASTLLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeArguments(EngineArguments):
    """Serve a model by OpenAI's API, with a chat page at / and metrics at /metrics.

    MODEL is a run folder, a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3), or a GGUF file. The API key comes
    from --api-key-file or the variable FASTLLM_API_KEY. SIGTERM and Ctrl-C let running answers end; a second one
    does not wait. Exit code: 0 after a signal; 2 for an error.
    """

    host: str = "127.0.0.1"  # the address to serve at; 0.0.0.0: all of this machine, with a key
    port: int = 8000  # 0: a free one
    name: str = ""  # what clients call the model; none: its file's or folder's name
    api_key_file: Path | None = None  # a file with the key that clients must give, on one line
    no_key: bool = False  # serve other machines without a key
    allow_host: tuple[str, ...] = ()  # names beside localhost that a proxy calls a loopback server by
    allow_origin: tuple[str, ...] = ()  # origins of web pages elsewhere that may ask (https://example.org); "*": all
    max_queue: int = 256  # answers that may wait; beyond them: status 429
    max_connections: int = 512  # beyond them: status 503
    max_body: int = 8  # MiB of a request; beyond them: status 413
    timeout: float = 600.0  # seconds that an answer may take; then: status 504
    drain: float = 30.0  # seconds for running answers after SIGTERM
    quiet: bool = False  # no line for each request

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("port", 0 <= self.port < 2**16, "be from 0 to 65535"),
            ("max-queue", self.max_queue >= 0, "not be negative"),
            ("max-connections", self.max_connections >= 1, "be at least 1"),
            ("max-body", 1 <= self.max_body <= 1024, "be from 1 to 1024"),
            ("timeout", 0 < self.timeout < math.inf, "be greater than 0"),
            ("drain", 0 <= self.drain < math.inf, "not be negative"),
            ("speculate", 0 <= self.speculate <= 64, "be from 0 to 64"),
            ("draft", self.draft is None or self.speculate > 0, "go with --speculate N"),
        ):
            if not ok:
                raise UserError(f"--{name} must {rule}")


ARGUMENTS: dict[str, type] = {"serve": ServeArguments}


def serve(argv: list[str]) -> int:
    chosen = arguments.parse(ServeArguments, "fastllm serve", argv)
    require_packages("fastllm serve", *PACKAGES, install=pip_install("serve"))

    import asyncio

    from .inference.async_engine import AsyncEngine
    from .inference.server import run
    from .inference.server.app import make_app
    from .inference.server.service import Service

    access = _access(chosen)
    listener = run.bind(chosen.host, chosen.port)
    with console.working(f"loading {chosen.model}"):
        engine = make_engine(chosen)
        engine.grammars.prepare()  # not while others wait
    note_early_end(chosen.model)
    model = served_model(engine, chosen.name or chosen.model.resolve().name.removesuffix(".gguf"))

    note = _chat_problem(engine)

    async def main() -> None:
        service = Service(AsyncEngine(engine), model, chosen.max_queue)
        app = make_app(
            service, access, max_body=chosen.max_body * 2**20, timeout=chosen.timeout,
            log=(lambda record: None) if chosen.quiet else _log,
        )  # fmt: skip
        url = run.url_of(listener)

        def ready() -> None:
            console.say("model", model.name)
            if note:
                console.say("note", note)
            console.say("API", f"{url}/v1" + " (with a key)" * (access.key is not None))
            console.say("chat page", f"{url}/")
            console.console.file.flush()

        await run.serve(
            app, service, listener, max_connections=chosen.max_connections, drain=chosen.drain, ready=ready,
            say=console.console.print,
        )  # fmt: skip

    with listener:
        asyncio.run(main())
    return 0


def _chat_problem(engine: Engine) -> str:
    """Why the model doesn't chat; "" where it does."""
    from .inference.prompts import chat_prompt

    if engine.tokenizer.chat_template is None:
        return "the model has no chat template: /v1/completions alone answers"
    try:
        chat_prompt(engine.tokenizer, [{"role": "user", "content": "hello"}])
    except UserError as error:
        return f"the model doesn't chat: {error}"
    return ""


def served_model(engine: Engine, name: str) -> Model:
    """The model of an engine as requests see it."""
    from .inference.server.bodies import Model

    tokenizer = engine.tokenizer
    longest = max(map(len, map(tokenizer.token_bytes, range(tokenizer.vocab_size))), default=1)
    return Model(name, tokenizer, engine.vocab_size, engine.max_seq_len, longest)


def _access(chosen: ServeArguments) -> Access:
    from .inference.server.gate import LOOPBACK_NAMES, Access

    key = _key(chosen.api_key_file)
    loopback = chosen.host in ("127.0.0.1", "localhost", "::1")
    if not loopback and key is None and not chosen.no_key:
        raise UserError(
            f"other machines may reach {chosen.host}: set a key by --api-key-file or {KEY_VARIABLE}, or say --no-key"
        )
    hosts = LOOPBACK_NAMES | {name.lower() for name in chosen.allow_host} if loopback else None
    return Access(key, hosts, frozenset(origin.rstrip("/") for origin in chosen.allow_origin))


def _key(path: Path | None) -> bytes | None:
    """The API key, from a file or the environment."""
    text = os.environ.get(KEY_VARIABLE)
    if path is not None:
        if text is not None:
            raise UserError(f"there are two API keys: --api-key-file and {KEY_VARIABLE}")
        with open_regular(path, "the API key ") as file:
            text = file.read(4097).decode("latin-1")
    if text is None:
        return None
    key, where = text.strip(), path or KEY_VARIABLE
    if not key or len(key) > 4096 or not all("!" <= c <= "~" for c in key):
        raise UserError(f"{where} must hold one API key: printable ASCII without spaces")
    return key.encode()


def _log(record: Record) -> None:
    tokens = "".join(f" {name}={count}" for name, count in record.tokens.items())
    path = record.path[:200].encode("unicode_escape").decode()
    line = f"{record.client} {record.method} {path} {record.status}{tokens} {record.seconds:.3f}s"
    console.console.file.write(f"{line}\n")
    console.console.file.flush()
