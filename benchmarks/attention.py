"""Attention and decoding: PyTorch's scaled_dot_product_attention, its backends one by one, and ours.

Bound by arithmetic: 4 · batch · heads · head_dim operations for each query and key that it sees (half of all, if
causal), and 3.5 times as many forward and backward (the scores are computed twice). Decoding is bound by one read of
the keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastllm.kernels import flash_attention, flash_decode

from . import peers
from .cases import OURS, PYTORCH, Call, Case, Scale, ours, short
from .timing import DEVICE

# PyTorch's own choice, and each that it can be made to take here.
SDPA: dict[str, SDPBackend | None] = {PYTORCH: None}
if DEVICE.type == "cuda":
    SDPA |= {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    SDPA |= {"SDPA efficient": SDPBackend.EFFICIENT_ATTENTION}
else:
    SDPA |= {"SDPA flash": SDPBackend.FLASH_ATTENTION}
SDPA |= {"SDPA math": SDPBackend.MATH}
MOST_SCORES = 2**31  # bytes of scores that "math" may hold


def cases(scale: Scale) -> Iterator[Case]:
    # batch, heads, tokens, head dimension; on a GPU 16k tokens in all, the sizes of FlashAttention's papers
    shapes = scale.pick(
        [(16384 // n, 2048 // d, n, d) for d in (64, 128) for n in (1024, 4096, 16384)],
        [(2, 12, 1024, 64), (1, 8, 4096, 128)],
        [(1, 12, 1024, 64)],
    )
    for shape in shapes:
        for dtype in scale.dtypes:
            for backward in scale.directions:
                yield _causal(*shape, dtype, backward)
    yield _windowed(*scale.pick((2, 16, 8192, 128, 1024), (1, 8, 4096, 64, 512), (1, 4, 1024, 64, 128)))
    for batch in scale.pick((1, 16), (1, 16), (1,)):
        yield _decode(batch, *scale.pick((32, 4, 32768, 128), (16, 2, 4096, 128), (16, 2, 2048, 128)))
    if not scale.quick:
        heads, dim = scale.pick((16, 128), (2, 64), None)
        for seq in scale.pick([2**n for n in range(9, 16)], [2**n for n in range(10, 15)], None):
            yield _causal(1, heads, seq, dim, torch.bfloat16, True, sweep=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend | None = None, **options: object) -> Tensor:
    """From and to heads after tokens, as our op has them: a view."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with nullcontext() if kernel is None else sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _steps(ops: dict[str, Callable], shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> dict[str, Call]:
    q, k, v, g = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(4))
    for t in (q, k, v):
        t.requires_grad_(backward)

    def step(op: Callable) -> None:
        out = op(q, k, v)
        if backward:
            q.grad = k.grad = v.grad = None
            out.backward(g)

    return {name: partial(step, op) for name, op in ops.items()}


def _causal(
    batch: int, heads: int, seq: int, dim: int, dtype: torch.dtype, backward: bool, sweep: bool = False
) -> Case:
    fits = batch * heads * seq * seq * dtype.itemsize <= MOST_SCORES
    kernels = {name: kernel for name, kernel in SDPA.items() if name != "SDPA math" or fits}
    ops: dict[str, Callable] = {n: partial(sdpa, kernel=kernel, is_causal=True) for n, kernel in kernels.items()}
    ops |= ({OURS: flash_attention} if sweep else ours(flash_attention)) | peers.attention()
    work = (3.5 if backward else 1.0) * 2 * batch * heads * seq * seq * dim
    return Case(
        "flash_attention", f"{batch}×{heads}×{seq}×{dim}", "forward+backward" if backward else "forward", short(dtype),
        work, "TFLOP/s", tuple(ops), lambda: _steps(ops, (batch, seq, heads, dim), dtype, backward),
        "tokens" if sweep else "", seq if sweep else 0,
    )  # fmt: skip


def _windowed(batch: int, heads: int, seq: int, dim: int, window: int) -> Case:
    """PyTorch has no windows but by a mask."""
    at = torch.arange(seq, device=DEVICE)
    seen = (at <= at[:, None]) & (at > at[:, None] - window)
    ops: dict[str, Callable] = {PYTORCH: partial(sdpa, attn_mask=seen)}
    ops |= ours(flash_attention, window=window)
    pairs = int(seen.sum())
    return Case(
        "flash_attention, window", f"{batch}×{heads}×{seq}×{dim}, {window}", "forward+backward", "bfloat16",
        3.5 * 4 * batch * heads * dim * pairs, "TFLOP/s", tuple(ops),
        lambda: _steps(ops, (batch, seq, heads, dim), torch.bfloat16, True),
    )  # fmt: skip


def _decode(batch: int, heads: int, kv_heads: int, tokens: int, dim: int) -> Case:
    """One token against a cache."""
    ops: dict[str, Callable] = {PYTORCH: partial(sdpa, enable_gqa=True)} | ours(flash_decode)

    def build() -> dict[str, Call]:
        q = torch.randn(batch, 1, heads, dim, dtype=torch.bfloat16, device=DEVICE)
        k, v = (torch.randn(batch, tokens, kv_heads, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        return {name: partial(op, q, k, v) for name, op in ops.items()}

    moved = 2 * 2 * batch * tokens * kv_heads * dim
    size = f"{batch}×{heads}/{kv_heads}×{tokens}×{dim}"
    return Case("flash_decode", size, "forward", "bfloat16", moved, "GB/s", tuple(ops), build)
