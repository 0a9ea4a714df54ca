"""Weights as the linear layer of inference reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, native
from ..backends import KERNEL_DTYPES

FEATURES = 32  # output features of a panel (csrc/linear.h)
DEPTH = 32  # a multiple of it is the depth of a panel in bfloat16 and int8


class Stored(NamedTuple):
    """A weight as operators take it."""

    data: Tensor
    scales: Tensor | None
    out_features: int
    panels: bool
    gated: bool


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight ``[out_features, in_features]`` as :func:`packed_linear` reads it; :func:`pack_weight` makes one.

    data: the matrix in panels, for the CPU kernels (csrc/linear.h), or as it is, contiguous. scales: a float32 for
    each of its rows where it is int8, else None. dtype: that of the weight, which x must have. gated: whether the
    product is SwiGLU's; the gate's rows come first, and the matrix has 2 · out_features.
    """

    data: Tensor
    scales: Tensor | None
    out_features: int
    in_features: int
    dtype: torch.dtype
    panels: bool
    gated: bool = False

    @property
    def device(self) -> torch.device:
        return self.data.device

    def matrix(self) -> Tensor:
        """The rows as they are stored, int8 where there are scales; the gate's first. Contiguous."""
        if not self.panels:
            return self.data
        return from_panels(self.data, self.out_features, self.in_features, self.gated)

    def unpack(self) -> Tensor:
        """What was packed, the gate's rows first, but for the rounding to int8: ``[out_features, in_features]``,
        gated ``[2 · out_features, in_features]``, contiguous."""
        found = self.matrix()
        return found.clone() if self.scales is None else dequantized(found, self.scales, self.dtype)


def pack_weight(weight: Tensor, *, gate: Tensor | None = None, quantize: str | None = None) -> PackedWeight:
    """A weight made ready for :func:`packed_linear`: once, where that is called many times.

    Args:
        weight: ``[out_features, in_features]`` float32, float16 or bfloat16, any strides. It is copied, without a
            gradient.
        gate: None, or like weight: the product is then ``silu(x gateᵀ) · (x weightᵀ)``, which is SwiGLU (Shazeer
            2020, arXiv:2002.05202) without the memory of the two products.
        quantize: ``"int8"``: a weight w of a row becomes the nearest multiple of a step, which is the largest
            magnitude of the row divided by 127, so that its error is at most half a step. Half the memory of
            bfloat16 is read; sums stay float32.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape, another ``quantize``, or a
            weight to quantise that is not finite.
    """
    checks.floating("pack_weight", "weight", weight, min_dim=2)
    if weight.ndim != 2:
        raise ValueError(f"pack_weight: weight must be [out_features, in_features], it has shape {list(weight.shape)}")
    if weight.dtype not in KERNEL_DTYPES:
        raise TypeError(f"pack_weight: weight must be float32, float16 or bfloat16, not {checks.short(weight.dtype)}")
    if quantize not in (None, "int8"):
        raise ValueError(f"pack_weight: quantize must be None or 'int8', not {quantize!r}")
    data, scales = weight.detach(), None
    if gate is not None:
        checks.like("pack_weight", "gate", gate, "weight", weight)
        data = torch.cat([gate.detach(), data])
    if quantize:
        data, scales = quantized(data)
    panels = weight.device.type == "cpu" and native.cpu_missing() is None
    data = in_panels(data, gate is not None) if panels else data.clone(memory_format=torch.contiguous_format)
    return PackedWeight(data, scales, *weight.shape, weight.dtype, panels, gate is not None)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers and their steps, one for each row."""
    most = weight.abs().amax(1).float() if weight.shape[1] else weight.new_zeros(weight.shape[0]).float()
    if not bool(most.isfinite().all()):
        raise ValueError("pack_weight: weight holds infinity or NaN, which int8 can't")
    scales = most / 127
    steps = torch.where(scales == 0, 1.0, scales)[:, None]
    return (weight.float() / steps).round().clamp(-127, 127).to(torch.int8), scales


def dequantized(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (data.float() * scales[:, None]).to(dtype)


def _interleaved(data: Tensor) -> int:
    return 2 if data.dtype == torch.bfloat16 else 1


def in_panels(weight: Tensor, gated: bool = False) -> Tensor:
    """``[panels, depth, FEATURES]``, and where steps of the depth are interleaved ``[panels, depth / 2, FEATURES, 2]``;
    zeros where there is nothing. ``gated``: half of each panel are rows of the weight's first half."""
    (rows, cols), steps, halves = weight.shape, _interleaved(weight), 1 + gated
    depth = cols + (-cols % DEPTH if weight.dtype in (torch.bfloat16, torch.int8) else 0)
    panels = -(-rows // FEATURES)
    missing = panels * FEATURES - rows
    padded = F.pad(weight.reshape(halves, rows // halves, cols), (0, depth - cols, 0, missing // halves))
    features = padded.view(halves, panels, FEATURES // halves, depth).transpose(0, 1)
    return features.reshape(panels, FEATURES, depth // steps, steps).transpose(1, 2).contiguous()


def from_panels(data: Tensor, out_features: int, cols: int, gated: bool = False) -> Tensor:
    """What :func:`in_panels` was given, contiguous."""
    (panels, depth, _, steps), halves = data.shape, 1 + gated
    features = data.transpose(1, 2).reshape(panels, halves, FEATURES // halves, depth * steps)
    rows = features.transpose(0, 1).reshape(halves, panels * FEATURES // halves, depth * steps)
    return rows[:, :out_features, :cols].reshape(halves * out_features, cols).contiguous()
