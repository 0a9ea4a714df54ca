"""Every GPU kernel once, on small shapes that reach its branches: for compute-sanitizer."""

from __future__ import annotations

import torch

from fastllm.kernels import rms_norm


def rms_norm_cases() -> None:
    for backend in ("cuda", "triton"):
        for cols in (1, 64, 100, 1024, 4096, 16384, 65544):
            x, r = (torch.randn(9, cols, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
            w = torch.ones(cols, device="cuda", requires_grad=True)
            y, h = rms_norm(x, w, residual=r, backend=backend)
            torch.autograd.backward([y, h], [y.detach(), h.detach()])


def main() -> None:
    rms_norm_cases()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
