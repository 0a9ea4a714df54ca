"""Softmax, cross-entropy and the head with its loss: PyTorch eager, torch.compile and each backend.

Bytes that must move, in tensors of [rows, cols]: softmax forward 2 (read x, write y), forward and backward 5
(and read y and dy, write dx); cross_entropy forward and backward 3 (read twice, write the gradient once).
linear_cross_entropy is bound by its three matrix products, 6 · tokens · features · classes operations; "products"
times these alone. Its memory is what a call holds at its peak beyond its inputs, gradients included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import DEVICE, extra_memory
from fastllm.kernels import backends, cross_entropy, linear_cross_entropy, softmax

ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.bfloat16, torch.float32]
KERNELS = [
    b for b in ("triton", "cuda", "cpu") if not backends.device_limit(b, DEVICE) and not backends.TRITON_INTERPRET
]
BASELINES = ["copy", "eager", "compile"]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compiled(call: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(call)


def pick(name: str, eager: Callable, ours: Callable) -> Callable:
    if name == "eager":
        return eager
    return compiled(eager) if name == "compile" else functools.partial(ours, backend=name)


# ---- softmax ----

SOFTMAX_SHAPES = [(32768, 4096), (16384, 32768), (4096, 262144)] if ON_GPU else [(8192, 2048)]


@pytest.mark.parametrize("name", [*BASELINES, *KERNELS])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SOFTMAX_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_softmax(measure: Any, shape: tuple[int, int], dtype: torch.dtype, backward: bool, name: str) -> None:
    x, g = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    size = x.numel() * x.element_size()
    if name == "copy":
        call, moved = (lambda: (x.clone(), g.clone())) if backward else x.clone, (4 if backward else 2) * size
    else:
        op, moved = pick(name, lambda x: torch.softmax(x, -1), softmax), (5 if backward else 2) * size
        x.requires_grad_(backward)

        def call() -> None:
            y = op(x)
            if backward:
                x.grad = None
                y.backward(g)

    direction = "forward+backward" if backward else "forward"
    measure(call, case=f"softmax {direction} {shape[0]}×{shape[1]} {short(dtype)}", implementation=name, bytes=moved)


@pytest.mark.parametrize("name", ["eager", "compile", *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_causal_softmax(measure: Any, dtype: torch.dtype, name: str) -> None:
    """Scores of attention: scaled, with the future masked."""
    heads, n = (64, 4096) if ON_GPU else (4, 2048)
    x = torch.randn(heads, n, n, dtype=dtype, device=DEVICE)
    future = torch.ones(n, n, dtype=torch.bool, device=DEVICE).triu(1)

    def eager(x: Tensor) -> Tensor:
        return (x * 0.125).masked_fill(future, float("-inf")).softmax(-1)

    op = pick(name, eager, functools.partial(softmax, scale=0.125, causal=True))
    moved = x.numel() * x.element_size() * 3 // 2  # half is read, all is written
    with torch.no_grad():
        measure(
            lambda: op(x),
            case=f"softmax scaled, causal {heads}×{n}×{n} {short(dtype)}",
            implementation=name,
            bytes=moved,
        )


# ---- cross-entropy ----

LOSS_SHAPES = [(32768, 4096), (16384, 32000), (8192, 131072), (4096, 262144)] if ON_GPU else [(2048, 32000)]
IN_PLACE = [f"{b}, in place" for b in KERNELS]


@pytest.mark.parametrize("name", [*BASELINES, *KERNELS, *IN_PLACE])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_cross_entropy(measure: Any, shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
    logits = torch.randn(shape, dtype=dtype, device=DEVICE)
    target = torch.randint(shape[1], shape[:1], device=DEVICE)
    size = logits.numel() * logits.element_size()
    if name == "copy":
        call, moved = logits.clone, 2 * size
    else:
        backend, _, in_place = name.partition(", ")
        op = pick(backend, F.cross_entropy, functools.partial(cross_entropy, inplace_backward=bool(in_place)))
        moved = 3 * size

        def call() -> None:
            # A new view each time: written over, its numbers are a gradient's, which costs no other time.
            leaf = logits.detach().requires_grad_()
            op(leaf, target).backward()

    case = f"cross_entropy forward+backward {shape[0]}×{shape[1]} {short(dtype)}"
    measure(call, case=case, implementation=name, bytes=moved)


LINEAR_SHAPES = [(16384, 4096, 32000), (16384, 4096, 128256)] if ON_GPU else [(2048, 768, 32000), (2048, 768, 128000)]
# PyTorch's own chunked form came with 2.13
CHUNKED = ["PyTorch, chunked"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else []


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


@pytest.mark.parametrize("name", ["products", "eager", "compile", *CHUNKED, *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_linear_cross_entropy(measure: Any, shape: tuple[int, int, int], dtype: torch.dtype, name: str) -> None:
    tokens, features, classes = shape
    if name in CHUNKED and shape != LINEAR_SHAPES[0]:
        pytest.skip("slow: one size shows it")
    hidden = torch.randn(tokens, features, dtype=dtype, device=DEVICE)
    weight = (torch.randn(classes, features, device=DEVICE) * features**-0.5).to(dtype)
    target = torch.randint(classes, (tokens,), device=DEVICE)
    if name == "products":

        def call() -> None:
            logits = hidden @ weight.t()
            logits @ weight, logits.t() @ hidden

    else:
        op = chunked if name in CHUNKED else pick(name, eager_linear, linear_cross_entropy)
        hidden.requires_grad_()
        weight.requires_grad_()

        def call() -> None:
            hidden.grad = weight.grad = None
            op(hidden, weight, target).backward()

    case = f"linear_cross_entropy forward+backward {tokens}×{features}×{classes} {short(dtype)}"
    call()
    hidden.grad = weight.grad = None
    memory = extra_memory(call)
    amount = 6 * tokens * features * classes / 1e12
    rounds = None if ON_GPU else 3
    measure(
        call, case=case, implementation=name, rounds=rounds, warmup=rounds and 1, amount=amount, unit="TFLOP/s",
        memory=memory,
    )  # fmt: skip


def eager_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)
