"""Reading a tokenizer.json that may be damaged, or of a kind that fastllm's tokenizer is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from ..errors import UserError
from ..input_files import one_line, parse_json, read_bytes, shown

FILE_LIMIT = 256 * 2**20  # bytes; files of 250,000 tokens have 35 million
PROBES = ("", "a", " ", "def add(a, b):  \n", "\t1234 é 日本 👩‍👩‍👧 x")  # texts that every tokenizer encodes
MOST_TOKENS = 2**22  # the library allocates memory for the largest id


def read_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer in a tokenizer.json, without truncation, padding and dropout.

    transformers, too, truncates and pads only where a call asks for it, whatever the file says.
    """
    return parse_tokenizer(read_bytes(path, FILE_LIMIT, "the tokenizer "), path)


def parse_tokenizer(content: bytes, path: str | Path) -> tokenizers.Tokenizer:
    """The same, of the content of a tokenizer.json; ``path`` is for errors."""
    try:
        values = parse_json(content, "it")
        _check(values)  # first: some files make the library abort
        with _silent():
            backend = tokenizers.Tokenizer.from_str(content.decode())
            backend.no_truncation()
            backend.no_padding()
            bpe = isinstance(backend.model, models.BPE)
            if bpe:
                backend.model.dropout = None  # a text has one encoding
            used = [token for text in PROBES for token in backend.encode(text).ids]
            known = backend.get_vocab().values()
        if max(used, default=0) > max(known, default=0):
            raise UserError(f"it encodes a text with the unknown token {max(used)}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and where it panics BaseException
        raise UserError(f"{path} is not a tokenizer: {one_line(error)}") from None
    if not bpe or not any(decoder.get("type") == "ByteLevel" for decoder in _parts(values.get("decoder"), "decoders")):
        raise UserError(f"the tokenizer {path} is no byte-level BPE, as GPT-2's, Llama 3's and Qwen's are")
    return backend


def _check(values: dict[str, Any]) -> None:
    """Raise UserError for what makes the library abort, or take all memory."""
    model = values.get("model")
    if not isinstance(model, dict):
        raise UserError(f"its model is {shown(model)}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"its {key} is {shown(model[key])}, which no byte-level BPE has")
    added = values.get("added_tokens") or []
    added = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    vocab = model.get("vocab")
    for number in (*(vocab.values() if isinstance(vocab, dict) else ()), *added):
        if type(number) is not int or not 0 <= number < MOST_TOKENS:
            raise UserError(f"the id of a token is {shown(number)}")


def _parts(value: Any, inner: str) -> Iterator[dict[str, Any]]:
    """A part of the file's pipeline, or those of a sequence of them, which are under the key ``inner``."""
    if isinstance(value, dict):
        yield value
        parts = value.get(inner)
        for part in parts if isinstance(parts, list) else ():
            yield from _parts(part, inner)


@contextmanager
def _silent() -> Iterator[None]:
    """Send what the library writes to stderr nowhere: where it panics, a backtrace, before it raises."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
        saved = os.dup(2)
    except OSError:  # stderr is closed or full: nothing shows there anyway
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
