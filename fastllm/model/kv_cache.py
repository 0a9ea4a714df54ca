"""The key/value cache of generation."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..config import ModelConfig


class CachedModel(Protocol):
    """What a cache needs to know of a model."""

    config: ModelConfig

    @property
    def head_weight(self) -> Tensor:
        """For the dtype and the device."""
        ...


FIRST_SIZE = 4096  # tokens that a cache has memory for at first


class LayerCache:
    """The keys and values of one layer, ``[batch, size, kv_heads, head_dim]``, filled from the start.

    Its memory grows with the tokens that it holds, up to ``size`` of each sequence.
    """

    def __init__(self, config: ModelConfig, batch: int, size: int, like: Tensor) -> None:
        shape = (batch, min(size, FIRST_SIZE), config.kv_heads, config.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length, self.size = 0, size

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + k.shape[1]
        if self.length > self.k.shape[1]:
            size = min(self.size, max(self.length, 2 * self.k.shape[1]))
            self.k, self.v = (_grown(t, start, size) for t in (self.k, self.v))
        self.k[:, start : self.length] = k
        self.v[:, start : self.length] = v
        return self.k[:, : self.length], self.v[:, : self.length]


def _grown(t: Tensor, length: int, size: int) -> Tensor:
    """``t`` with memory for ``size`` tokens, of which it holds the first ``length``."""
    larger = t.new_empty(t.shape[0], size, *t.shape[2:])
    larger[:, :length] = t[:, :length]
    return larger


class KVCache:
    """A :class:`LayerCache` for each layer of a GPT, for ``batch`` sequences of one length.

    ``size``: tokens that fit into each sequence; None: the model's ``max_seq_len``.
    """

    def __init__(self, model: CachedModel, batch: int = 1, size: int | None = None) -> None:
        config, size = model.config, size or model.config.max_seq_len
        self.layers = [LayerCache(config, batch, size, model.head_weight) for _ in range(config.layers)]

    @property
    def length(self) -> int:
        """Tokens held of each sequence."""
        return self.layers[0].length
