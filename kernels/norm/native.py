"""RMSNorm in the native module: C++ on CPUs, CUDA C++ on NVIDIA GPUs (csrc/*/rms_norm.*)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import KERNELS, as_rows, place


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    differentiated: bool,
    backend: str,
    *outputs: Tensor | None,
) -> None:
    rows = as_rows(x), weight, as_rows(residual)
    KERNELS[backend].rms_norm_forward(*rows, eps, weight_offset, *outputs, *place(x))


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    weight_offset: float,
    need_dweight: bool,
    backend: str,
    dx: Tensor,
    dweight: Tensor | None,
) -> None:
    device, stream = place(x)
    workspace = None
    if dweight is not None:
        partials = KERNELS[backend].rms_norm_partials(x, device)
        workspace = torch.empty(partials, x.shape[-1], dtype=torch.float32, device=x.device)
    KERNELS[backend].rms_norm_backward(
        as_rows(dy), as_rows(x), weight, rstd, as_rows(dh), weight_offset, dx, dweight, workspace,
        device, stream,
    )  # fmt: skip
