"""Every GPU kernel once, on small shapes that reach its branches: for compute-sanitizer."""

from __future__ import annotations

import torch

from fastllm.kernels import cross_entropy, linear_cross_entropy, rms_norm, softmax

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


def main() -> None:
    rms_norm_cases()
    softmax_cases()
    cross_entropy_cases()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
