"""The linear layer of inference in Triton. Few rows are bound by one read of the weight.

Tiles have one size, whatever the number of rows, and the depth is never split: so a row is summed up by the same
instructions in the same order in any company. A single row pays for that with products of zeros, which take less time
than the weight takes to arrive.
"""

from __future__ import annotations

import torch
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


@Kernel
def forward_kernel(
    X, W, SCALES, BIAS, OUT, rows, depth, features,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """OUT [rows, features] = X Wᵀ · SCALES + BIAS; X [rows, depth] and W [features, depth] are contiguous."""
    row_blocks = tl.cdiv(rows, ROWS)  # programs side by side share a part of W
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = (tl.program_id(0) // row_blocks).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    k = tl.arange(0, DEPTH)
    depth, features = multiple(depth, ALIGNED), multiple(features, ALIGNED)
    x_at = X + (row * depth)[:, None] + k[None, :]
    w_at = W + (feature * depth)[None, :] + k[:, None]
    acc = tl.zeros([ROWS, FEATURES], tl.float32)
    for first in range(0, depth, DEPTH):
        within = first + k < depth
        x = tl.load(x_at + first, (row < rows)[:, None] & within[None, :], other=0.0)
        w = tl.load(w_at + first, (feature < features)[None, :] & within[:, None], other=0.0)
        if SCALES is not None:
            w = w.to(tl.float32).to(x.dtype)  # exact
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if SCALES is not None:
        acc = acc * tl.load(SCALES + feature, feature < features, other=0.0)[None, :]
    if BIAS is not None:
        acc = acc + tl.load(BIAS + feature, feature < features, other=0.0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    tl.store(OUT + (row * features)[:, None] + feature[None, :], acc.to(OUT.dtype.element_ty), mask)


def packed_linear_forward(
    x: Tensor, weight: Stored, bias: Tensor | None, wide: bool, backend: str, out: Tensor
) -> None:
    out_features, depth = weight.out_features, x.shape[-1]
    rows = out.numel() // out_features
    aligned = (depth | out_features) % 8 == 0
    features, block, stages = _tile(x.dtype, aligned)
    forward_kernel(
        (cdiv(rows, ROWS) * cdiv(out_features, features), 1, 1),
        (x.contiguous(), weight.data, weight.scales, bias, out),
        (rows, depth, out_features),
        (aligned, ROWS, features, block),
        num_stages=stages,
    )
