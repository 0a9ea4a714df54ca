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


class LayerCache:
    """The keys and values of one layer, ``[batch, size, kv_heads, head_dim]``, filled from the start."""

    def __init__(self, config: ModelConfig, batch: int, size: int, like: Tensor) -> None:
        shape = (batch, size, config.kv_heads, config.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + k.shape[1]
        self.k[:, start : self.length] = k
        self.v[:, start : self.length] = v
        return self.k[:, : self.length], self.v[:, : self.length]


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
