"""From raw text to training batches: sources, cleaning, duplicates, corpora, tokenizer, shards of tokens, loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corpus.shards import read_corpus

__all__ = ["read_corpus"]

if not TYPE_CHECKING:  # at first use: a training run on text files needs none of it

    def __getattr__(name: str) -> Any:
        if name == "read_corpus":
            from .corpus.shards import read_corpus

            return read_corpus
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
