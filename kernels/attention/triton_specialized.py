"""What the warp-specialised kernels share: masks, and the conditions under which they run.

For sm_90: one warp group loads tiles with TMA, two more have 64 rows each, and one's softmax runs beside the other's
products. Triton makes this of a plain loop (``tl.range(…, warp_specialize=True)``) if it is the only one, has no branch
in it, four warps are asked for and a block has 128 rows.

It cuts the rows in two by adding 64 to the number by which a descriptor loads them, and does so too where that number
meets a tensor, whose rows it has cut already. So the position of a row must come from another number than the one that
its tile is loaded by. tests/ttgir runs what Triton made of it.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import TRITON_INTERPRET
from ..triton_launch import Kernel, cdiv
from .packing import Packing
from .triton_tiles import LOG2E, Sizes, sequence

STATISTICS = 1024  # queries of a program

MISSED = tl.constexpr(32)  # rows at a time of those that no program computes: more, or fewer, take more registers
COMPILED = tl.constexpr(not TRITON_INTERPRET)
PACK = tl.constexpr(16)  # elements of a thread that one piece of inline code has


def _hiding(instead: str) -> tl.constexpr:
    n = PACK.value
    code = ["{ .reg .pred whole, seen;", f"setp.ne.s32 whole, ${4 * n}, 0;", "@whole bra.uni done${:uid};"]
    for i in range(n):
        code += [f"setp.le.s32 seen, ${2 * n + i}, ${3 * n + i};", f"selp.f32 ${i}, ${i}, {instead}, seen;"]
    return tl.constexpr("\n".join([*code, "done${:uid}: }"]))


TO_ZERO_CODE, TO_MINUS_INFINITY_CODE = _hiding("0f00000000"), _hiding("0fff800000")
OPERANDS = tl.constexpr(",".join(["=f"] * PACK.value + [str(i) for i in range(PACK.value)] + ["r"] * 3 * PACK.value))


@triton.jit
def hide(x, first, second, whole, TO_ZERO: tl.constexpr):
    """``x`` where first <= second, elsewhere 0 or -inf. Where ``whole``, a scalar, is true, all of ``x`` at no cost.

    A branch would keep Triton from specialising warps; one in inline code does not.
    """
    if COMPILED:
        x = tl.inline_asm_elementwise(
            TO_ZERO_CODE if TO_ZERO else TO_MINUS_INFINITY_CODE, OPERANDS, [x, first, second, whole.to(tl.int32)],
            dtype=tl.float32, is_pure=True, pack=PACK,
        )  # fmt: skip
    else:
        x = tl.where(whole | (first <= second), x, 0.0 if TO_ZERO else float("-inf"))
    return x


@triton.jit
def readable_sequence(CU, index, seq):
    """``sequence``, but an empty one begins at 0: its first row is read before the loop."""
    first, length = sequence(CU, index, seq)
    return tl.where(length > 0, first, 0), length


@triton.jit
def first_statistic(CU, batch, first):
    """Where a sequence's rows begin among those of a head: at a multiple of 4, 16 bytes, behind those before it."""
    at = 0
    if CU is not None:
        at = first // 4 * 4 + 4 * batch
    return at


@Kernel
def statistics_kernel(
    LSE, DELTA, CU_Q, LSE_OUT, DELTA_OUT, seq_q, heads, blocks, lse_batch, lse_head, out_batch, out_head,
    ROWS: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta, of ROWS queries of a head, to where TMA can read them."""
    item, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head = tl.cast(item // heads, tl.int64), item % heads
    first_q, seq_q = sequence(CU_Q, batch, seq_q)
    source = batch * lse_batch + head * tl.cast(lse_head, tl.int64) + first_q
    to = batch * out_batch + head * tl.cast(out_head, tl.int64) + first_statistic(CU_Q, batch, first_q)
    # the last one has what is left, more than ROWS where max_seqlen is less than the sequence's length
    end = tl.where(first == (blocks - 1) * ROWS, seq_q, tl.minimum(first + ROWS, seq_q))
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        lse = tl.load(LSE + source + row, row < end, other=0.0)
        delta = tl.load(DELTA + source + row, row < end, other=0.0)
        # a query that sees nothing gives every key probability 0
        tl.store(LSE_OUT + to + row, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), row < end)
        tl.store(DELTA_OUT + to + row, delta, row < end)


def statistics(lse: Tensor, delta: Tensor, size: Sizes, packing: Packing) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """lse and delta as the specialised kernels read them, and the numbers lse_batch and lse_head of both."""
    packed, tokens = packing.cu_seqlens_q is not None, lse.shape[-1]
    length = cdiv(tokens, 4) * 4 + (4 * size.sequences if packed else 0)
    places = 0 if packed else size.heads * length, length
    items, blocks = size.sequences * size.heads, cdiv(size.seq_q, STATISTICS)
    rows = lse.new_empty(2, lse.numel() // tokens, length)
    statistics_kernel(
        (items * blocks, 1, 1),
        (lse, delta, packing.cu_seqlens_q, rows[0], rows[1]),
        (size.seq_q, size.heads, blocks, 0 if packed else size.heads * tokens, tokens, *places),
        (STATISTICS,),
    )
    return rows[0], rows[1], places


def can_specialize(*tensors: Tensor) -> bool:
    """Whether TMA can read them: 16-bit elements, every size and stride a multiple of 16 bytes, no stride of 0."""
    for x in tensors:
        *sizes, dim = x.shape
        strides = [stride for stride, size in zip(x.stride(), sizes, strict=False) if size > 1]
        if x.element_size() != 2 or dim % 8 or x.data_ptr() % 16 or any(s % 8 or s < dim for s in strides):
            return False
    return True


def with_memory(kernel: Kernel) -> Callable[..., None]:
    """``kernel``, for whose descriptors Triton asks the allocator of the context: here PyTorch's memory."""

    def launch(*arguments: Any, **options: Any) -> None:
        triton.set_allocator(_allocate)
        kernel(*arguments, **options)

    return functools.partial(contextvars.copy_context().run, launch)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
