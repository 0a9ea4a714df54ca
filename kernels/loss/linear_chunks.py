"""The logits of a linear layer chunk by chunk, with the cross-entropy kernels and the gradients' products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..library import in_torch_func, launchers
from ..native import multiplies_bfloat16
from .cross_entropy_op import check_range
from .options import Options, Targets, Upstream


class Linear(NamedTuple):
    """``hidden @ weightᵀ + bias``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def detach(self) -> Linear:
        return Linear(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())


class Wanted(NamedTuple):
    """Which gradients of a :class:`Linear` are computed, and whether weight's is added up in float32."""

    need_hidden: bool
    need_weight: bool
    need_bias: bool
    accumulate_float32: bool

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, accumulate_float32: bool) -> Wanted:
        """Those of what requires one now; in torch.func, where torch.compile does not see which do, all."""
        on, all_ = torch.is_grad_enabled(), in_torch_func()
        needed = (t is not None and (all_ or (on and t.requires_grad)) for t in (hidden, weight, bias))
        return cls(*needed, accumulate_float32)


def chunk_size(tokens: int) -> int:
    """Tokens whose logits are held at a time: a fifth of them, in sixteens, but 256 to 2048. PyTorch holds three
    times all of them, so this is a fifteenth; fewer would keep the matrix products from their speed (README.md)."""
    fifth = -(-tokens // 80) * 16
    return max(1, min(tokens, max(256, min(2048, fifth))))


@torch.no_grad()
def run_chunks(
    linear: Linear,
    targets: Targets,
    options: Options,
    backend: str,
    *,
    lse: Tensor,
    loss: Tensor | None = None,
    entropy: Tensor | None = None,
    upstream: Upstream | None = None,
    grads: tuple[Tensor, ...] = (),
    accumulate_float32: bool = False,
) -> None:
    """Chunk by chunk: the logits; the forward into ``loss``, ``lse`` and ``entropy``, where a loss is given (an entropy
    too or not); the backward of ``upstream`` into ``grads``, where they are given."""
    check_range("linear_cross_entropy", targets.target, options)
    kernels = launchers(__package__, backend)
    products = Products(linear, len(targets.target), grads, accumulate_float32)
    for chunk in products.chunks:
        logits, here = products.logits(chunk), targets._replace(target=targets.target[chunk])
        if loss is not None:
            spread = None if entropy is None else entropy[chunk]
            kernels.cross_entropy_forward(logits, here, options, backend, loss[chunk], lse[chunk], spread)
        if grads:
            above = Upstream(*(None if g is None else g[chunk] for g in upstream))
            kernels.cross_entropy_backward(logits, here, lse[chunk], above, options, backend, logits)
            products.backward(chunk, logits)
    products.finish()


class Products:
    """The matrix products of a layer with its logits, and with their gradients, chunk by chunk.

    ``grads``: memory for the gradients of hidden, weight and bias; empty where one is not wanted. :meth:`finish` ends
    the sums in it."""

    def __init__(self, linear: Linear, tokens: int, grads: tuple[Tensor, ...], accumulate_float32: bool) -> None:
        hidden, features, self.dtype = linear.hidden, linear.hidden.shape[-1], _product_dtype(linear.hidden)
        rows, head = (t.to(hidden.dtype).to(self.dtype) for t in (hidden.reshape(tokens, features), linear.weight))
        if self.dtype == torch.bfloat16 and hidden.device.type == "cpu":
            rows, head = _close_together(rows), _close_together(head)
        self.rows, self.head = rows, head
        self.bias = None if linear.bias is None else linear.bias.to(hidden.dtype).to(self.dtype)
        dhidden, dweight, self.dbias = grads or (hidden.new_empty(0),) * 3
        self.dhidden = dhidden.view(tokens, features) if dhidden.numel() else None
        self.weight_sum = _Sum(dweight, torch.float32 if accumulate_float32 else self.dtype)
        self.bias_sum = torch.zeros_like(self.dbias, dtype=torch.float32)
        step = chunk_size(tokens)
        self.chunks = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
        self.buffer = hidden.new_empty(step, len(head), dtype=self.dtype)

    def logits(self, chunk: slice) -> Tensor:
        """In the memory of the chunk before."""
        logits = self.buffer[: chunk.stop - chunk.start]
        _product(self.rows[chunk], self.head, self.bias, logits)
        return logits

    def backward(self, chunk: slice, dlogits: Tensor) -> None:
        """The gradients that are wanted, of those of a chunk's logits."""
        if self.dhidden is not None:
            out = self.dhidden[chunk]
            wide = out if out.dtype == self.dtype else out.new_empty(out.shape, dtype=self.dtype)
            out.copy_(torch.mm(dlogits, self.head, out=wide))  # onto itself: nothing; without out= autocast narrows it
        if self.weight_sum.out.numel():
            self.weight_sum.add(dlogits, self.rows[chunk])
        if self.dbias.numel():
            self.bias_sum += dlogits.sum(0, dtype=torch.float32)

    def finish(self) -> None:
        self.weight_sum.finish()
        self.dbias.copy_(self.bias_sum)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """float32 on a CPU that can't multiply matrices in a narrower dtype: PyTorch would imitate it at a fifth of the
    speed."""
    if hidden.device.type != "cpu" or hidden.dtype == torch.float32:
        return hidden.dtype
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32


def _close_together(x: Tensor) -> Tensor:
    """oneDNN's products of bfloat16 multiply what lies behind an odd row by 0, NaN too."""
    return x.contiguous() if x.stride(1) == 1 and x.stride(0) != x.shape[1] else x


def _product(hidden: Tensor, head: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """``logits = hidden @ headᵀ + bias``. On a CPU in float32 in blocks of classes that a cache holds: in one
    piece PyTorch's product reads the head's columns too far apart, and takes a third longer."""
    blocks = 1024 if hidden.device.type == "cpu" and hidden.dtype == torch.float32 else len(head)
    for start in range(0, len(head), blocks):
        block = slice(start, start + blocks)
        if bias is None:
            torch.mm(hidden, head[block].t(), out=logits[:, block])
        else:
            torch.addmm(bias[block], hidden, head[block].t(), out=logits[:, block])


def _adds_in_float32(x: Tensor) -> bool:
    """Whether PyTorch's product of 16-bit matrices adds to a float32 one, as cuBLAS does, and rounds nothing before."""
    return x.is_cuda and torch.version.hip is None and x.dtype in (torch.float16, torch.bfloat16)


class _Sum:
    """The sum of ``a.t() @ b`` over chunks, in ``dtype``, into ``out``."""

    BLOCK = 4096  # rows of a product that waits to be added in another dtype

    def __init__(self, out: Tensor, dtype: torch.dtype) -> None:
        self.out, self.empty = out, True
        self.total = out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.total.dtype == b.dtype:
            if self.empty:
                torch.mm(a.t(), b, out=self.total)
            else:
                torch.addmm(self.total, a.t(), b, out=self.total)
        elif _adds_in_float32(b):
            if self.empty:
                torch.mm(a.t(), b, out_dtype=torch.float32, out=self.total)
            else:
                torch.addmm(self.total, a.t(), b, out_dtype=torch.float32, out=self.total)
        else:
            for total, columns in zip(self.total.split(self.BLOCK), a.split(self.BLOCK, 1), strict=True):
                product = torch.mm(columns.t(), b)
                total.copy_(product) if self.empty else total.add_(product)
        self.empty = False

    def finish(self) -> None:
        if self.empty:
            self.total.zero_()
        if self.total is not self.out:
            self.out.copy_(self.total)
