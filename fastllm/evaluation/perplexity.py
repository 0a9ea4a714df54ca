"""Perplexity and bits per byte of texts, which tokenizers don't change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.progress import progress
from ..errors import UserError
from .models import Model
from .rows import SUFFIXES, BadRow, read_rows, read_text
from .scoring import Scored
from .statistics import around


def read_documents(paths: Sequence[Path]) -> list[str]:
    """The texts of files: of tables and JSON lines the ``text`` of each row, of others all as one."""
    found = []
    for path in paths:
        if path.suffix.lower() in SUFFIXES:
            for row in read_rows(path):
                try:
                    found.append(row.text("text"))
                except BadRow as reason:
                    raise UserError(f"{row.where}: {reason}") from None
        else:
            found.append(read_text(path))
    texts = [text for text in found if text.strip()]
    if not texts:
        raise UserError(f"--text: {', '.join(map(str, paths))} hold no text")
    return texts


def windows(tokens: Sequence[int], prefix: Sequence[int], length: int, stride: int) -> Iterator[Scored]:
    """Each token once, in windows of at most ``length`` inputs, of which all but the first score ``stride`` tokens.

    The first token comes after ``prefix``. With ``stride = length`` a window's first token sees one token, as in the
    harness; a smaller stride gives each token more context and takes more time.
    """
    whole = [*prefix, *tokens]
    done = min(len(whole), length + 1)
    yield Scored(whole[:done], len(prefix))
    while done < len(whole):
        end = min(done + stride, len(whole))
        first = end - length - 1
        yield Scored(whole[first:end], done - first)
        done = end


def checked_stride(model: Model, stride: int | None) -> int:
    """What ``stride`` stands for; UserError where it is no stride."""
    if stride is not None and not 1 <= stride <= model.max_seq_len:
        most = f"{model.max_seq_len:,} tokens that the model sees"
        raise UserError(f"--stride must be from 1 to the {most}, it is {stride}")
    return stride or model.max_seq_len


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def perplexity(model: Model, documents: Sequence[str], stride: int | None = None) -> dict[str, Any]:
    """The log-probability of texts, by token, word, and byte of UTF-8.

    Args:
        model: which reads them.
        documents: texts, each from its beginning.
        stride: tokens that each window scores after the first; None: all that it sees.

    Returns:
        ``perplexity`` (of tokens, which depends on the tokenizer), ``word_perplexity``, ``byte_perplexity``,
        ``bits_per_byte`` with its standard error over documents, and ``n`` documents, ``tokens``, ``words``, ``bytes``.
    """
    length = model.max_seq_len
    stride = checked_stride(model, stride)
    tokenizer = model.tokenizer
    prefix = tokenizer.encode("") or [tokenizer.eos_id]
    parts: list[Scored] = []
    owner: list[int] = []
    tokens = 0
    for place, document in enumerate(documents):
        try:
            ids = tokenizer.encode(document, add_special_tokens=False)
        except TypeError:  # a lone surrogate
            raise UserError(f"--text: document {place + 1:,} is not valid Unicode: {document[:40]!r}") from None
        tokens += len(ids)
        found = [*windows(ids, prefix, length, stride)]
        parts += found
        owner += [place] * len(found)
    nats = [0.0] * len(documents)
    with progress("text", model.plan(parts)) as bar:
        for computed, scores in model.score(parts):
            for place, score in scores:
                nats[owner[place]] -= score.log_prob
            bar.advance(computed)
    sizes = [len(document.encode()) for document in documents]
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    total, size = sum(nats), sum(sizes)
    bits = total / math.log(2) / size
    result: dict[str, Any] = {
        "bits_per_byte": bits, "perplexity": _exp(total / tokens), "word_perplexity": _exp(total / words),
        "byte_perplexity": _exp(total / size), "n": len(documents), "tokens": tokens, "words": words, "bytes": size,
        "window": length, "stride": stride,
    }  # fmt: skip
    if (n := len(documents)) > 1:  # of a ratio of sums over documents
        spread = sum((x / math.log(2) - bits * y) ** 2 for x, y in zip(nats, sizes, strict=True))
        stderr = math.sqrt(spread * n / (n - 1)) / size
        result |= {"stderr": stderr, "interval": around(bits, stderr)}
    return result
