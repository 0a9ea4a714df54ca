"""Batches for training: the protocol of a data source, and windows of tokens as its first implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .progress import progress
from .tokenizer import Tokenizer

IGNORE_INDEX = -100  # the target of a token that does not count

Batch = dict[str, Tensor]  # CPU tensors by name; dimension 0 is the item, dimension 1 (where there is one) the token


class BatchSource(Protocol):
    """Items by their index. ``batch`` is a pure function of the index: any rank may read any item at any time."""

    def batch(self, index: int, n: int) -> Batch:
        """Items ``index`` to ``index + n``."""
        ...

    def padding(self) -> Batch:
        """One item that does not count, for a rank that has none left in a micro-batch."""
        ...


class DataSource(BatchSource, Protocol):
    """What a run is trained on: items by their index in the run, for as many epochs as it takes.

    The items depend on the source's seed and the index alone. So a rank reads the items that it owns and no others,
    and a resumed run reads what it would have read.
    """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps to recognise the source: values that JSON can hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; raises UserError where this is another source."""
        ...


class TokenDataset:
    """Windows of ``seq_len`` tokens, each once an epoch, in an order that ``seed`` decides: ``tokens`` and ``targets``.

    Each epoch cuts the windows at another offset. Both tensors are int64 ``[n, seq_len]``; the targets are one token
    later.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int) -> None:
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.windows = max(1, (len(tokens) - 1) // seq_len - 1)
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def batch(self, index: int, n: int) -> Batch:
        return gather_windows(self.tokens, np.array([self._start(i) for i in range(index, index + n)]), self.seq_len)

    def padding(self) -> Batch:
        return padding_window(self.seq_len)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "tokens": len(self.tokens)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in self.state_dict().items():
            if state.get(key) != value:
                raise UserError(f"the checkpoint was trained on data of {key} {state.get(key)}, this is {key} {value}")

    def _start(self, index: int) -> int:
        epoch, window = divmod(index, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offset = rng.integers(len(self.tokens) - self.windows * self.seq_len)
            self._epoch, self._starts = epoch, rng.permutation(self.windows) * self.seq_len + offset
        return self._starts[window]


class EvalDataset:
    """Up to ``max_tokens / seq_len`` windows, evenly spaced over ``tokens``, in their order."""

    def __init__(self, tokens: np.ndarray, seq_len: int, max_tokens: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.starts = eval_starts(tokens, seq_len, max_tokens)

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, index: int, n: int) -> Batch:
        return gather_windows(self.tokens, self.starts[index : index + n], self.seq_len)

    def padding(self) -> Batch:
        return padding_window(self.seq_len)


def eval_starts(tokens: np.ndarray, seq_len: int, max_tokens: int) -> np.ndarray:
    """The starts of up to ``max_tokens / seq_len`` windows, evenly spaced over ``tokens`` and without overlap."""
    windows = (len(tokens) - 1) // seq_len
    count = max(1, min(windows, max_tokens // seq_len))
    return np.arange(count) * windows // count * seq_len


def gather_windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> Batch:
    """``tokens`` and ``targets``, int64 ``[len(starts), seq_len]``; the targets are one token later."""
    window = torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return {"tokens": window[:, :-1], "targets": window[:, 1:]}


def padding_window(seq_len: int) -> Batch:
    """One window whose targets do not count."""
    tokens = torch.zeros(1, seq_len, dtype=torch.int64)
    return {"tokens": tokens, "targets": torch.full_like(tokens, IGNORE_INDEX)}


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """One row of token ids, the end-of-text token before each document and after the last; uint16 where the ids fit.

    So each document ends with that token, which a model learns to predict, and begins behind it.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    eos = np.array([tokenizer.eos_id], dtype).tobytes()
    row = bytearray(eos)
    with progress("encoding", sum(map(len, documents))) as bar:
        for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
            row += ids.astype(dtype).tobytes()
            row += eos
            bar.advance(len(text))
    return np.frombuffer(row, dtype)


def unigram_loss(train: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    """Nats per token that the token frequencies of ``train`` (each count plus one) give ``targets``."""
    counts = np.ones(vocab_size)
    for start in range(0, len(train), 2**20):  # bincount makes 64-bit integers of all that it is given
        counts += np.bincount(train[start : start + 2**20], minlength=vocab_size)
    return float(-np.log(counts / counts.sum())[targets].mean())
