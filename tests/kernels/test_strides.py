"""Every tensor argument of every op, in every memory order, gives what its contiguous copy gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import kernels
from fastllm.kernels import pack_weight
from fastllm.kernels.backends import OPS
from tests.conftest import GPU

BATCH, SEQ, HEADS, KV_HEADS, DIM, CLASSES = 2, 3, 2, 1, 8, 9


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def classes(*shape: int) -> Tensor:
    return torch.randint(CLASSES, shape)


def attention(batch: tuple[int, ...] = (BATCH,)) -> dict[str, Tensor]:
    return {"q": randn(*batch, SEQ, HEADS, DIM), **dict.fromkeys(("k", "v"), randn(*batch, SEQ, KV_HEADS, DIM))}


def arguments() -> list[tuple[str, str, dict[str, Tensor], dict[str, Any]]]:
    """(op, what the case adds, its tensors, its other arguments); together they have every tensor of every op."""
    rows = {"hidden": randn(BATCH, SEQ, DIM), "weight": randn(CLASSES, DIM), "target": classes(BATCH, SEQ)}
    cache = {f"{x}_cache": randn(BATCH, SEQ, KV_HEADS, DIM) for x in "kv"}
    angles = {"cos": randn(SEQ, DIM // 2), "sin": randn(SEQ, DIM // 2)}
    heads = {"q": randn(BATCH, SEQ, HEADS, DIM), "k": randn(BATCH, SEQ, KV_HEADS, DIM)}
    pools, table = {f"{x}_cache": randn(4, 16, KV_HEADS, DIM) for x in "kv"}, torch.randperm(4).view(2, 2).int()
    tokens_of = {x: randn(SEQ, KV_HEADS if x in "kv" else HEADS, DIM) for x in "qkv"}
    slots = torch.randperm(64)[:SEQ]
    starts = torch.tensor([0, 2, SEQ])
    logits = {"logits": randn(BATCH, SEQ, CLASSES), "target": classes(BATCH, SEQ), "weight": torch.rand(CLASSES)}
    linear = rows | {"bias": randn(CLASSES), "class_weight": torch.rand(CLASSES)}
    teacher = {"teacher_hidden": randn(BATCH, SEQ, 5), "teacher_weight": randn(CLASSES, 5)}
    jsd = {x: rows[x] for x in ("hidden", "weight")} | {"bias": randn(CLASSES), **teacher}
    jsd |= {"teacher_bias": randn(CLASSES), "mask": randn(BATCH, SEQ) > -0.5}
    tokens = {"hidden": randn(BATCH, DIM), "weight": randn(CLASSES, DIM), "target": classes(BATCH)}
    return [
        ("rms_norm", "", {"x": randn(2, 3, 7), "weight": randn(7), "residual": randn(2, 3, 7)}, {}),
        ("softmax", "boolean", {"x": randn(2, 3, 7), "mask": randn(2, 3, 7) > 0}, {}),
        ("softmax", "additive", {"x": randn(2, 3, 7), "mask": randn(2, 1, 7)}, {"causal": True}),
        ("swiglu", "", {"gate": randn(2, 3, 7), "up": randn(2, 3, 7)}, {}),
        ("packed_linear", "", {"x": randn(2, 3, 7), "bias": randn(5)}, {"weight": pack_weight(randn(5, 7))}),
        ("rope", "", heads | angles | {"positions": torch.randint(SEQ, (BATCH, SEQ))}, {}),
        ("rope", "in place", heads | angles, {"inplace": True}),
        ("cross_entropy", "", logits, {"label_smoothing": 0.1}),
        ("cross_entropy", "each", logits, {"reduction": "none", "return_lse": True}),
        ("linear_cross_entropy", "", linear, {"label_smoothing": 0.1}),
        ("linear_cross_entropy", "each", linear, {"reduction": "none", "return_lse": True}),
        ("linear_cross_entropy", "one token each", tokens, {}),
        ("linear_log_prob", "", rows | {"bias": randn(CLASSES)}, {}),
        ("linear_log_prob", "entropy", rows | {"bias": randn(CLASSES)}, {"temperature": 0.7, "return_entropy": True}),
        ("linear_jsd", "", jsd, {"beta": 0.3}),
        ("linear_jsd", "each", jsd, {"reduction": "none"}),
        ("flash_attention", "", attention() | {"sinks": randn(HEADS)}, {"return_lse": True}),
        (
            "flash_attention",
            "packed",
            attention(()) | {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "sinks": randn(HEADS)},
            {"return_lse": True},
        ),
        (
            "flash_decode",
            "",
            {"q": randn(BATCH, 1, HEADS, DIM), **cache, "cache_seqlens": torch.tensor([3, 2]), "sinks": randn(HEADS)},
            {"return_lse": True},
        ),
        (
            "flash_decode",
            "in pages",
            {"q": randn(BATCH, 1, HEADS, DIM), **pools, "cache_seqlens": torch.tensor([30, 2]), "block_table": table},
            {},
        ),
        ("rope_append", "", tokens_of | angles | {"positions": classes(SEQ) % SEQ, **pools, "slots": slots}, {}),
    ]  # fmt: skip


def forms(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``x`` in other memory orders; where it is expanded, with other values."""
    if x.dim() == 0:
        return
    yield "every second", x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    yield "a column", x.new_zeros(*x.shape, 3)[..., 1].copy_(x)
    yield (
        "in reverse order",
        x.clone().permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    )
    yield "behind one element", x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    yield "rows apart", x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)[..., : x.shape[-1]].copy_(x)
    for dim in range(x.dim()):
        yield f"expanded along {dim}", x.clone().narrow(dim, 0, 1).expand(x.shape)


def results(op: Callable[..., Any], tensors: dict[str, Tensor], upstream: list[Tensor], options: dict[str, Any]) -> Any:
    """Outputs and gradients; where it raises, the error's text."""
    leaves = []
    without = (kernels.flash_decode, kernels.packed_linear, kernels.rope_append)
    if op not in without and not options.get("inplace"):
        leaves = [x for x in LEAVES if x in tensors and not (x == "weight" and op is kernels.cross_entropy)]
    tensors = {x: t.detach().requires_grad_(x in leaves) for x, t in tensors.items()}
    try:
        out = op(**tensors, **options)
    except (ValueError, IndexError) as error:
        return str(error)
    out = out if isinstance(out, tuple) else (out,)
    if op is kernels.rope_append:
        out += tensors["k_cache"], tensors["v_cache"]
    grads = torch.autograd.grad(out, [tensors[x] for x in leaves], upstream) if leaves else ()
    return [*(y.detach().clone() for y in out), *grads]


LEAVES = ("x", "weight", "residual", "gate", "up", "q", "k", "v", "sinks", "logits", "hidden", "bias")
IN_TRITON = ("every second", "in reverse order", "expanded along 0", "expanded along 1")
CASES = [
    pytest.param(i, backend, id=f"{name} {what} {backend}".replace("  ", " "))
    for i, (name, what, *_) in enumerate(arguments())
    for backend in OPS[name].kernels
    if not (backend == "cuda" and what == "in pages")
    if not (GPU and backend == "triton")  # the interpreter is off; tests marked gpu run the kernel itself
]


def test_the_cases_have_every_tensor_of_every_op():
    tested = {name: {x for op, _, tensors, _ in arguments() if op == name for x in tensors} for name in OPS}
    for name, op in OPS.items():
        there = {x for x, p in inspect.signature(op.function).parameters.items() if "Tensor" in str(p.annotation)}
        assert there == tested[name], name


@pytest.mark.parametrize(("case", "backend"), CASES)
def test_memory_order_changes_nothing(case, backend, request):
    if backend == "cuda":
        request.getfixturevalue("simt")
    name, _, tensors, options = arguments()[case]
    op, options = getattr(kernels, name), options | {"backend": backend}
    if backend == "cuda":
        narrow = [x for x in tensors if name.startswith("flash") and x[0] in "qkv"]  # its kernels take no float32
        tensors |= {x: tensors[x].half() for x in narrow}
    out = op(**{x: t.clone() for x, t in tensors.items()}, **options)
    upstream = [torch.randn_like(y) for y in (out if isinstance(out, tuple) else (out,))]

    def call(argument: str | int, value: Tensor) -> Any:
        given, above = {x: t.clone() for x, t in tensors.items()}, list(upstream)
        if isinstance(argument, int):
            above[argument] = value
        else:
            given[argument] = value
        return results(op, given, above, options)

    plain = call(0, upstream[0])
    written = ("q", "k") if options.get("inplace") else ("k_cache", "v_cache") if name == "rope_append" else ()
    for argument, x in [*tensors.items(), *enumerate(upstream)]:
        for form, other in forms(x):
            if backend == "triton" and x.dim() > 1 and form not in IN_TRITON:
                continue  # the interpreter is slow; what its launchers prepare, the others' do too
            at, expected = f"{argument} {form}", plain
            if form.startswith("expanded"):
                expected = call(argument, other.clone(memory_format=torch.contiguous_format))
            got = call(argument, other)
            overlaps = any(n > 1 and step == 0 for n, step in zip(other.shape, other.stride(), strict=True))
            if argument in written and overlaps:
                assert "share memory" in got, at
            elif isinstance(expected, str):
                assert got == expected, at
            else:
                for y, right in zip(got, expected, strict=True):
                    torch.testing.assert_close(y, right, msg=lambda m, at=at: f"{at}: {m}")
