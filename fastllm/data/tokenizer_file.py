"""Reading a tokenizer.json that may be damaged, or of a kind that fastllm's tokenizer is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from ..errors import UserError
from ..input_files import one_line, parse_json, read_bytes, shown

FILE_LIMIT = 256 * 2**20  # bytes; files of 250,000 tokens have 35 million
MOST_TOKENS = 2**22  # the library allocates memory for the largest id


def read_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer in a tokenizer.json, without truncation, padding and dropout.

    transformers, too, truncates and pads only where a call asks for it, whatever the file says.
    """
    content = read_bytes(path, FILE_LIMIT, "the tokenizer ")
    try:
        values = parse_json(content, "it")
        _check(values)  # first: some files make the library abort
        backend = tokenizers.Tokenizer.from_str(content.decode())
        backend.no_truncation()
        backend.no_padding()
        bpe = isinstance(backend.model, models.BPE)
        if bpe:
            backend.model.dropout = None  # a text has one encoding
        used, known = backend.encode("a b").ids, backend.get_vocab().values()
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
    """Raise UserError for what the library doesn't check."""
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
    for normalizer in _parts(values.get("normalizer"), "normalizers"):
        if normalizer.get("type") == "Prepend" and not normalizer.get("prepend"):
            raise UserError("its normalizer prepends nothing")
    for template in _parts(values.get("post_processor"), "processors"):
        known = template.get("special_tokens")
        for name in _template_tokens(template):
            if not (isinstance(known, dict) and isinstance(name, str) and name in known):
                raise UserError(f"its post_processor adds the unknown token {shown(name)}")


def _parts(value: Any, inner: str) -> Iterator[dict[str, Any]]:
    """A part of the file's pipeline, or those of a sequence of them, which are under the key ``inner``."""
    if isinstance(value, dict):
        yield value
        parts = value.get(inner)
        for part in parts if isinstance(parts, list) else ():
            yield from _parts(part, inner)


def _template_tokens(template: dict[str, Any]) -> Iterator[Any]:
    for form in (template.get("single"), template.get("pair")):
        for piece in form if isinstance(form, list) else ():
            if isinstance(piece, dict) and isinstance(piece.get("SpecialToken"), dict):
                yield piece["SpecialToken"].get("id")
