"""Files of prompts, answered in order: JSON lines in, JSON lines out."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from ..data.progress import progress
from ..errors import UserError
from ..input_files import one_line
from .engine import Engine
from .prompts import chat_prompt
from .request import Request
from .sampling import SamplingParams

AHEAD = 4  # times max_batch: lines that are read before the first of them is answered
OPTIONS = {f.name for f in fields(SamplingParams)} - {"grammar", "logit_bias"}


@dataclass
class _Line:
    """A line of the input, and the requests that answer it; ``size``: its bytes."""

    values: dict[str, Any]
    requests: list[Request]
    size: int


def answer_file(engine: Engine, path: Path, out: Path | None, params: SamplingParams) -> int:
    """Answer the prompts of a file; ``out`` grows line by line, and what it holds already is not answered again.

    Returns 0, or 1 where a line could not be answered: its output has "error".

    Raises:
        UserError: the file can't be read, or ``out`` holds something else.
    """
    failed, plain = 0, path.suffix == ".txt"
    try:
        size = path.stat().st_size
        source = path.open("rb")
    except OSError as error:
        raise UserError(f"can't read the prompts {path}: {error.strerror}") from None
    with source, _opened(out) as sink, progress("generate", size) as bar:
        contents = ((number, content) for number, content in enumerate(source, 1) if content.strip())
        if out is not None:
            bar.advance(_skip_answered(contents, out, plain))
        for line in _answered(engine, _lines(engine, contents, plain, params)):
            values = line.values | _answers(line.requests)
            failed += "error" in values
            sink.write((json.dumps(values, ensure_ascii=False) + "\n").encode())
            sink.flush()
            bar.advance(line.size)
    if failed:
        print(f'fastllm: {failed} lines have no answer: see their "error"', file=sys.stderr)
    return 1 if failed else 0


def _opened(out: Path | None) -> AbstractContextManager[IO[bytes]]:
    try:
        return nullcontext(sys.stdout.buffer) if out is None else out.open("ab")
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from None


def _skip_answered(contents: Iterator[tuple[int, bytes]], out: Path, plain: bool) -> int:
    """Pass over the prompts whose answers ``out`` holds; the bytes of them. Half a line at its end is cut off."""
    size = whole = 0
    with out.open("rb+") as file:
        for answer in file:
            if not answer.endswith(b"\n"):
                break
            number, content = next(contents, (0, b""))
            prompt, answered = _values_if_any(content, plain), _values_if_any(answer, False)
            if not content or any(answered.get(key) != value for key, value in prompt.items()):
                raise UserError(f"{out} is there already and is not of these prompts; choose another file with --out")
            size, whole = size + len(content), whole + len(answer)
        file.truncate(whole)
    return size


def _values(content: bytes, plain: bool) -> dict[str, Any]:
    """The object of a line, or the prompt that a ``plain`` line is; UserError where it is neither."""
    try:
        text = content.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    return {"prompt": text} if plain else _object(text)


def _values_if_any(content: bytes, plain: bool) -> dict[str, Any]:
    try:
        return _values(content, plain)
    except UserError:
        return {}


def _lines(
    engine: Engine, contents: Iterator[tuple[int, bytes]], plain: bool, params: SamplingParams
) -> Iterator[_Line]:
    """The lines, their requests queued; one that can't be answered has an "error" and no request."""
    for number, content in contents:
        values: dict[str, Any] = {}
        try:
            values = _values(content, plain)
            own = {name: values[name] for name in values.keys() & OPTIONS}
            requests = engine.add(_prompt(engine, values), replace(params, **own))
            yield _Line(values, requests, len(content))
        except (UserError, TypeError) as error:
            yield _Line(values | {"error": f"line {number}: {one_line(error)}"}, [], len(content))


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError("it is no JSON object")
    return values


def _prompt(engine: Engine, values: dict[str, Any]) -> Any:
    if isinstance(values.get("messages"), list):
        return chat_prompt(engine.tokenizer, values["messages"])
    prompt = values.get("prompt")
    if not isinstance(prompt, str):
        raise UserError('it has no "prompt" (a text) and no "messages" (a list)')
    return engine.prompt(prompt)


def _answered(engine: Engine, lines: Iterator[_Line]) -> Iterator[_Line]:
    """The lines in order, answered; the engine has enough of them to keep its batch full."""
    queue: deque[_Line] = deque()
    more = True
    try:
        while more or queue:
            while more and len(queue) < AHEAD * engine.max_batch:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    queue.append(line)
            while queue and all(request.finish_reason is not None for request in queue[0].requests):
                yield queue.popleft()
            engine.step()
    finally:
        for line in queue:
            for request in line.requests:
                engine.cancel(request)


def _answers(requests: list[Request]) -> dict[str, Any]:
    if not requests:
        return {}
    try:
        completions = [request.completion() for request in requests]
    except UserError as error:
        return {"error": str(error)}
    one = completions[0]
    found: dict[str, Any] = {"text": one.text, "finish_reason": one.finish_reason}
    if len(completions) > 1:
        found = {"texts": [c.text for c in completions], "finish_reasons": [c.finish_reason for c in completions]}
    found |= {"prompt_tokens": one.prompt_tokens, "completion_tokens": sum(len(c.tokens) for c in completions)}
    if requests[0].params.logprobs is not None:
        found["logprobs"] = [c.logprobs for c in completions] if len(completions) > 1 else one.logprobs
    return found
