"""The linear layer of inference in Triton. Few rows are bound by one read of the weight.

Tiles have one size, whatever the number of rows, and the depth is never split: so a row is summed up by the same
instructions in the same order in any company. A single row pays for that with products of zeros, which take less time
than the weight takes to arrive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import Kernel, cdiv, multiple
from .packed import Stored

ROWS = 64  # of a tile


def _tile(dtype: torch.dtype, aligned: bool) -> tuple[int, int, int]:
    """Features and depth of a tile, and stages of the loads: a function of the weight alone."""
    if dtype == torch.float32:
        return 32, 16, 2  # without tensor cores: what fits in registers
    return (64, 64, 3) if aligned else (64, 32, 2)


@triton.jit
def _widened(w, x):
    return w if w.dtype == x.dtype else w.to(tl.float32).to(x.dtype)  # of int8, exact


@Kernel
def forward_kernel(
    X, W, SCALES, BIAS, OUT, rows, depth, features,
    GATED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """OUT [rows, features] = X Wᵀ · SCALES + BIAS; X [rows, depth] and W [features, depth] are contiguous. GATED: that
    times silu(X gateᵀ · SCALES), where the gate's rows and scales stand before those of W."""
    row_blocks = tl.cdiv(rows, ROWS)  # programs side by side share a part of W
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = (tl.program_id(0) // row_blocks).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    k = tl.arange(0, DEPTH)
    depth, features = multiple(depth, ALIGNED), multiple(features, ALIGNED)
    x_at = X + (row * depth)[:, None] + k[None, :]
    gate_at = W + (feature * depth)[None, :] + k[:, None]
    behind = features.to(tl.int64) * depth if GATED else 0  # where the rows of W begin
    acc = tl.zeros([ROWS, FEATURES], tl.float32)
    gate = acc
    for first in range(0, depth, DEPTH):
        within = first + k < depth
        x = tl.load(x_at + first, (row < rows)[:, None] & within[None, :], other=0.0)
        seen = (feature < features)[None, :] & within[:, None]
        acc = tl.dot(x, _widened(tl.load(gate_at + (first + behind), seen, other=0.0), x), acc, input_precision="ieee")
        if GATED:
            gate = tl.dot(x, _widened(tl.load(gate_at + first, seen, other=0.0), x), gate, input_precision="ieee")
    if SCALES is not None:
        scale_at = SCALES + features + feature if GATED else SCALES + feature
        acc = acc * tl.load(scale_at, feature < features, other=0.0)[None, :]
    if BIAS is not None:
        acc = acc + tl.load(BIAS + feature, feature < features, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if SCALES is not None:
            gate = gate * tl.load(SCALES + feature, feature < features, other=0.0)[None, :]
        acc = gate * tl.sigmoid(gate) * acc
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    tl.store(OUT + (row * features)[:, None] + feature[None, :], acc.to(OUT.dtype.element_ty), mask)


def packed_linear_forward(
    x: Tensor, weight: Stored, bias: Tensor | None, wide: bool, backend: str, out: Tensor
) -> None:
    out_features, depth = weight.out_features, x.shape[-1]
    rows = out.numel() // out_features
    aligned = (depth | out_features) % 8 == 0
    features, block, stages = _tile(x.dtype, aligned)
    features = features // 2 if weight.gated else features  # of both
    forward_kernel(
        (cdiv(rows, ROWS) * cdiv(out_features, features), 1, 1),
        (x.contiguous(), weight.data, weight.scales, bias, out),
        (rows, depth, out_features),
        (weight.gated, aligned, ROWS, features, block),
        num_stages=stages,
    )
