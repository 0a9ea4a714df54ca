"""Every GPU kernel once, on small shapes that reach its branches: for compute-sanitizer."""

from __future__ import annotations

import torch

from fastllm.kernels import (
    cross_entropy,
    flash_attention,
    flash_decode,
    linear_cross_entropy,
    rms_norm,
    rope,
    softmax,
    swiglu,
)

BACKENDS = ("cuda", "triton")


def rms_norm_cases() -> None:
    for backend in BACKENDS:
        for cols in (1, 64, 100, 1024, 4096, 16384, 65544):
            x, r = (torch.randn(9, cols, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
            w = torch.ones(cols, device="cuda", requires_grad=True)
            y, h = rms_norm(x, w, residual=r, backend=backend)
            torch.autograd.backward([y, h], [y.detach(), h.detach()])


def softmax_cases() -> None:
    for backend in BACKENDS:
        for cols in (1, 64, 100, 1024, 4096, 16384, 65544, 131073):
            x = torch.randn(2, 5, cols, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            bias = torch.randn(2, 1, cols, device="cuda")
            for options in ({}, {"causal": True}, {"mask": bias}, {"mask": bias > 0, "causal": True}):
                softmax(x, backend=backend, **options).sum().backward()


def cross_entropy_cases() -> None:
    for backend in BACKENDS:
        for classes in (1, 64, 100, 1024, 32000, 131073):
            logits = torch.randn(9, classes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            target = torch.arange(9, device="cuda") % classes
            target[::3] = -100
            target[1] = 2**40  # out of range: nothing may be read there
            weight = torch.rand(classes, device="cuda")
            every = {"weight": weight, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
            for options in ({}, {"label_smoothing": 0.1}, every):
                loss, lse = cross_entropy(logits, target, return_lse=True, backend=backend, **options)
                (loss + lse.sum()).backward()
        hidden, weight = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (300, 1000))
        linear_cross_entropy(hidden, weight, torch.arange(300, device="cuda"), backend=backend).backward()


def rope_and_swiglu_cases() -> None:
    for backend in BACKENDS:
        for dim, rotary in ((128, 128), (80, 40), (5, 2)):
            q, k = (torch.randn(2, 9, h, dim, device="cuda", requires_grad=True) for h in (7, 1))
            angle = torch.randn(9, rotary // 2, device="cuda")
            positions = torch.arange(18, device="cuda").view(2, 9) - 2  # outside the tables: nothing may be read
            for interleaved in (False, True):
                options = {"interleaved": interleaved, "positions": positions, "backend": backend}
                sum(t.sum() for t in rope(q, k, angle.cos(), angle.sin(), **options)).backward()
        for cols in (1, 100, 4104):
            gate, up = (torch.randn(5, cols, device="cuda", requires_grad=True) for _ in range(2))
            swiglu(gate, up, backend=backend).sum().backward()


def attention_cases() -> None:
    for seq_q, seq_k, dim in ((1, 1, 8), (200, 300, 64), (300, 200, 128)):
        q = torch.randn(2, seq_q, 4, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (
            torch.randn(2, seq_k, 2, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
        )
        cu_q, cu_k = (torch.tensor([0, n // 3, n], device="cuda") for n in (2 * seq_q, 2 * seq_k))
        flash_attention(q, k, v, backend="triton").sum().backward()
        packed = [t.flatten(0, 1) for t in (q, k, v)]
        options = {"window": 70, "softcap": 5.0, "sinks": torch.zeros(4, device="cuda"), "return_lse": True}
        out, lse = flash_attention(*packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend="triton", **options)
        (out.sum() + lse.masked_fill(lse.isinf(), 0.0).sum()).backward()
        with torch.no_grad():
            flash_decode(q[:, :2], k, v, torch.tensor([seq_k, 0], device="cuda"), backend="triton")


def main() -> None:
    rms_norm_cases()
    softmax_cases()
    cross_entropy_cases()
    rope_and_swiglu_cases()
    attention_cases()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
