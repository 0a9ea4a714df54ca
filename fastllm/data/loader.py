"""Text to batches: reading a corpus, holding out a part of it, encoding it, and drawing from it."""

from __future__ import annotations

import numpy as np

from .tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """One row of token ids, the end-of-text token before each document; uint16 where the ids fit."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = np.array([tokenizer.end], dtype)
    return np.concatenate([part.astype(dtype) for ids in tokenizer.encode_batch(documents) for part in (end, ids)])


class Batches:
    """Windows of ``context`` tokens from ``tokens``, each once an epoch, in an order set by ``seed`` alone.

    Each epoch cuts the windows at another offset.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.windows = max(1, (len(tokens) - 1) // context - 1)
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows number ``first`` to ``first + count`` of the run: inputs and targets, int64 ``[count, context]``."""
        starts = np.array([self._start(i) for i in range(first, first + count)])
        return cut(self.tokens, starts, self.context)

    def valid_tokens(self, first: int, count: int) -> int:
        """Targets that count among these windows: all do. Every process knows it without asking the others."""
        return count * self.context

    def _start(self, index: int) -> int:
        epoch, window = divmod(index, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offset = rng.integers(len(self.tokens) - self.windows * self.context)
            self._epoch, self._starts = epoch, rng.permutation(self.windows) * self.context + offset
        return self._starts[window]


def spread(tokens: np.ndarray, context: int, count: int) -> np.ndarray:
    """The starts of up to ``count / context`` windows, evenly over ``tokens`` and without overlap."""
    windows = (len(tokens) - 1) // context
    wanted = max(1, min(windows, count // context))
    return np.arange(wanted) * windows // wanted * context


def cut(tokens: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int64 ``[len(starts), context]``; the targets are one token further on."""
    window = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return window[:, :-1], window[:, 1:]


def unigram_loss(train: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    """Nats per token that the token frequencies of ``train`` (each count plus one) give ``targets``."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[targets].mean())
