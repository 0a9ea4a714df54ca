"""RMSNorm in the native module: C++ on CPUs, CUDA C++ on NVIDIA GPUs (csrc/*/rms_norm.*)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import DTYPE_CODES, KERNELS, as_rows, place, pointer


def _code(weight: Tensor | None) -> int:
    return 0 if weight is None else DTYPE_CODES[weight.dtype]


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    h: Tensor,
    rstd: Tensor,
    eps: float,
    weight_offset: float,
    backend: str,
) -> None:
    x, x_rows = as_rows(x)
    residual, residual_rows = as_rows(residual)
    weight = None if weight is None else weight.contiguous()
    KERNELS[backend].rms_norm_forward(
        x_rows, residual_rows, pointer(weight), y.data_ptr(), h.data_ptr(), rstd.data_ptr(),
        rstd.numel(), x.shape[-1], eps, weight_offset, DTYPE_CODES[x.dtype], _code(weight), *place(x),
    )  # fmt: skip


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dh: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    weight_offset: float,
    backend: str,
) -> None:
    dy, dy_rows = as_rows(dy)
    x, x_rows = as_rows(x)
    dh, dh_rows = as_rows(dh)
    weight = None if weight is None else weight.contiguous()
    module, cols = KERNELS[backend], x.shape[-1]
    device, stream = place(x)
    partials = 0
    workspace = None
    if dweight.numel():
        partials = module.rms_norm_partials(rstd.numel(), cols, DTYPE_CODES[x.dtype], device)
        workspace = torch.empty(partials, cols, dtype=torch.float32, device=x.device)
    module.rms_norm_backward(
        dy_rows, x_rows, dh_rows, pointer(weight), rstd.data_ptr(), dx.data_ptr(),
        dweight.data_ptr() if dweight.numel() else 0, pointer(workspace), partials,
        rstd.numel(), cols, weight_offset, DTYPE_CODES[x.dtype], _code(weight), device, stream,
    )  # fmt: skip
