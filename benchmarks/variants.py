"""How often Triton compiles each kernel over calls as models make them. Needs no GPU.

    python -m benchmarks.variants

A group of calls below differs in sizes, strides and numbers alone, for which nothing should be compiled again: one
variant of each kernel, and a second one where not all strides are multiples of 16 bytes or a tile has another size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

from .targets import compiling_nothing, current_target, specialized_attention

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

Calls = Iterator[Callable[[], object]]


def groups() -> Iterator[tuple[str, Calls]]:
    """(name, calls): the kernels are those of a model in bfloat16, its calls those of training and generation."""
    import torch

    from fastllm import kernels
    from fastllm.kernels import flash_attention, flash_decode

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16)

    def leaf(*shape: int) -> torch.Tensor:
        return empty(*shape).requires_grad_()

    def trained(op: Callable, *tensors: torch.Tensor, **options: object) -> None:
        found = op(*tensors, backend="triton", **options)
        for out in found if isinstance(found, tuple) else (found,):
            out.sum().backward(retain_graph=True)

    def attention(dim: int = 128, **options: object) -> Calls:
        shapes = ((1, 512, 32, 8), (4, 2048, 32, 8), (2, 999, 16, 2), (3, 1, 4, 4), (1, 4096, 48, 1), (7, 77, 6, 3))
        for batch, seq, heads, kv_heads in shapes:
            fused = leaf(batch, seq, heads + 2 * kv_heads, dim)
            yield partial(trained, flash_attention, *fused.split((heads, kv_heads, kv_heads), 2), **options)
            q, kv = leaf(batch, seq, heads, dim), leaf(batch, 2 * seq, kv_heads, dim)
            yield partial(trained, flash_attention, q, kv, kv, **options)

    def packed() -> Calls:
        for lengths in ((512,), (100, 30, 1), (7, 7, 7, 7), (1000, 24)):
            cu = torch.tensor([0, *lengths]).cumsum(0)
            q, kv = leaf(sum(lengths), 16, 128), leaf(sum(lengths), 4, 128)
            yield partial(trained, flash_attention, q, kv, kv, cu_seqlens_q=cu, max_seqlen_q=max(lengths))

    def specialized(calls: Calls) -> Calls:
        def run(call: Callable[[], object]) -> None:
            with specialized_attention():
                call()

        for call in calls:
            yield partial(run, call)

    def generated() -> Calls:
        for batch, heads, kv_heads, capacity in ((1, 32, 8, 512), (1, 32, 8, 4096), (16, 32, 32, 1000), (5, 12, 1, 77)):
            q, cache = empty(batch, 1, heads, 128), empty(batch, capacity, kv_heads, 128)
            held = torch.full((batch,), 50)
            yield partial(flash_decode, q, cache, cache, held, backend="triton")
            yield partial(flash_decode, q, cache[:, :40], cache[:, :40], held, backend="triton")

    def generated_in_pages() -> Calls:
        for batch, heads, kv_heads, columns, size in ((1, 32, 8, 32, 16), (4, 32, 8, 256, 16), (5, 12, 1, 7, 128)):
            q, pool = empty(batch, 1, heads, 128), empty(99, size, kv_heads, 128)
            held, table = torch.full((batch,), 50), torch.zeros(batch, columns, dtype=torch.int32)
            yield partial(flash_decode, q, pool, pool, held, block_table=table, backend="triton")
            more = empty(batch, 3, heads, 128)
            yield partial(flash_decode, more, pool, pool, held, block_table=table, backend="triton")

    def prefilled() -> Calls:
        for batch, seq, heads, kv_heads in ((1, 100, 32, 8), (8, 2048, 32, 8), (3, 333, 12, 12)):
            q, kv = empty(batch, seq, heads, 128), empty(batch, seq, kv_heads, 128)
            yield partial(flash_attention, q, kv, kv, backend="triton")

    def rms_norm() -> Calls:
        for shape in ((1, 4096), (1000, 4096), (4, 77, 4096), (2, 3, 4000)):
            yield partial(trained, kernels.rms_norm, leaf(*shape), leaf(shape[-1]))
            heads = leaf(5, 7, 2, shape[-1])
            yield partial(trained, kernels.rms_norm, heads[:, :, 0], leaf(shape[-1]))

    def softmax() -> Calls:
        for shape in ((1, 4096), (2, 3, 5, 4096), (7, 7, 4000)):
            yield partial(trained, kernels.softmax, leaf(*shape), scale=0.3)

    def cross_entropy() -> Calls:
        for rows, classes, ignored in ((1, 32000, -100), (999, 128256, 0), (64, 151936, -1), (16, 100352, 2**40)):
            target = torch.zeros(rows, dtype=torch.long)
            yield partial(trained, kernels.cross_entropy, leaf(rows, classes), target, ignore_index=ignored)

    def odd_classes() -> Calls:
        for rows in (1, 7, 999):
            yield partial(trained, kernels.cross_entropy, leaf(rows, 50257), torch.zeros(rows, dtype=torch.long))

    def linear_cross_entropy() -> Calls:
        for tokens, classes in ((10, 32000), (700, 8192), (300, 5000)):
            target = torch.zeros(tokens, dtype=torch.long)
            yield partial(trained, kernels.linear_cross_entropy, leaf(tokens, 16), leaf(classes, 16), target)

    def entropy() -> Calls:
        def both(*inputs: torch.Tensor, **options: object) -> torch.Tensor:
            log_prob, entropy = kernels.linear_log_prob(*inputs, return_entropy=True, **options)
            return log_prob + entropy

        for tokens, classes, temperature in ((10, 32000, 0.7), (700, 8192, 1.3)):
            target = torch.zeros(tokens, dtype=torch.long)
            yield partial(trained, both, leaf(tokens, 16), leaf(classes, 16), target, temperature=temperature)

    def linear_jsd() -> Calls:
        for tokens, classes, beta in ((10, 32000, 0.5), (700, 8192, 0.1), (300, 5000, 0.9)):
            teacher = empty(tokens, 32), empty(classes, 32)
            yield partial(trained, kernels.linear_jsd, leaf(tokens, 16), leaf(classes, 16), *teacher, beta=beta)

    def rope() -> Calls:
        for batch, seq, heads in ((1, 1, 32), (4, 2048, 32), (3, 77, 32)):
            table = torch.zeros(4096, 64)
            q, k = leaf(batch, seq, heads, 128), leaf(batch, seq, heads, 128)
            yield partial(trained, kernels.rope, q, k, table, table)

    def rope_append() -> Calls:
        for tokens, heads, kv_heads, size in ((1, 32, 8, 16), (33, 32, 8, 64), (7, 12, 12, 16)):
            x, pool, table = empty(tokens, heads + 2 * kv_heads, 128), empty(9, size, kv_heads, 128), empty(64, 64)
            q, k, v = x.split([heads, kv_heads, kv_heads], 1)
            at = torch.zeros(tokens, dtype=torch.long)
            yield partial(kernels.rope_append, q, k, v, table, table, at, pool, pool, at, backend="triton")

    def swiglu() -> Calls:
        for shape in ((1, 11008), (4, 333, 11008), (2, 5632), (1000, 14336)):
            both = leaf(*shape[:-1], 2 * shape[-1])
            yield partial(trained, kernels.swiglu, leaf(*shape), leaf(*shape))
            yield partial(trained, kernels.swiglu, *both.chunk(2, -1))

    yield "attention", attention()
    yield "attention, head_dim 64, full", attention(64, causal=False)
    yield "attention, window and softcap", attention(window=100, softcap=30.0)
    yield "attention, head_dim 80", attention(80)
    yield "attention, head_dim 75, whose rows are no multiples of 16 bytes", attention(75)
    yield "packed attention", packed()
    yield "attention, warps specialised", specialized(attention())
    yield "packed attention, warps specialised", specialized(packed())
    yield "prefill", prefilled()
    yield "decode", generated()
    yield "decode in pages", generated_in_pages()
    yield "rms_norm", rms_norm()
    yield "softmax", softmax()
    yield "cross_entropy", cross_entropy()
    yield "cross_entropy, 50257 classes", odd_classes()
    yield "linear_cross_entropy", linear_cross_entropy()
    yield "linear_log_prob, temperature and entropy", entropy()
    yield "linear_jsd", linear_jsd()
    yield "rope", rope()
    yield "rope_append", rope_append()
    yield "swiglu", swiglu()


@contextmanager
def on_a_gpu_that_is_not_there() -> Iterator[list[JITFunction]]:
    """CPU tensors go to the Triton kernels as on an H100, whose launches do nothing; gives what would be compiled."""
    from fastllm.kernels import backends, triton_launch
    from fastllm.kernels.attention import triton_decode, triton_tuning

    with ExitStack() as stack:
        stack.enter_context(current_target("sm_90a"))
        compiled = stack.enter_context(compiling_nothing())
        for place, name, put in (
            (backends, "device_limit", lambda backend, device: None),
            (triton_tuning, "architecture", lambda device: "sm_90a"),
            (triton_launch, "processors", lambda device: 132),
            (triton_decode, "processors", lambda device: 132),
        ):
            stack.enter_context(mock.patch.object(place, name, put))
        yield compiled


def variants() -> dict[str, dict[str, tuple[int, int]]]:
    """Group -> kernel -> (how many variants Triton compiles, how many launches there were)."""
    from fastllm.kernels.triton_launch import Kernel

    found: dict[str, dict[str, tuple[int, int]]] = {}
    launch = Kernel.__call__
    with on_a_gpu_that_is_not_there() as compiled:
        for group, calls in groups():
            compiled.clear()
            launched: list[Kernel] = []

            def counted(kernel: Kernel, *given: object, launched: list = launched, **options: int) -> None:
                launched.append(kernel)
                launch(kernel, *given, **options)

            with mock.patch.object(Kernel, "__call__", counted):
                for call in calls:
                    call()
            names = [kernel.jit for kernel in launched]
            found[group] = {jit.__name__: (compiled.count(jit), names.count(jit)) for jit in dict.fromkeys(names)}
            for kernel in launched:  # as a new process
                kernel.compiled.clear()
                kernel.jit.device_caches.clear()
    return found


def report(found: dict[str, dict[str, tuple[int, int]]]) -> str:
    lines = ["| calls | kernel | launches | compiled |", "|---|---|---:|---:|"]
    for group, kernels in found.items():
        lines += [f"| {group} | {kernel} | {launches} | {n} |" for kernel, (n, launches) in kernels.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(variants()))
