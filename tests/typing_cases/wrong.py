"""Wrong calls: mypy and pyright find an error in each marked line, and in no other."""

from __future__ import annotations

import torch
from torch import Tensor

import fastllm
from fastllm import kernels
from fastllm.kernels import cross_entropy, flash_attention, rms_norm, rope, softmax, swiglu, use_backend

x = torch.ones(2, 4)

rms_norm()  # wrong
rms_norm(x, None, 1e-6)  # wrong
rms_norm(x, ep=1e-6)  # wrong
rms_norm(x, weight="w")  # wrong
y: Tensor = rms_norm(x, residual=x)  # wrong
flash_attention(x, x)  # wrong
flash_attention(x, x, x, is_causal=True)  # wrong
flash_attention(x, x, x, window="4")  # wrong
flash_attention(x, x, x, layout=True)  # wrong
out: Tensor = flash_attention(x, x, x, return_lse=True)  # wrong
flash_attention(x, x, x, return_lse=True).sum()  # wrong
cross_entropy(x)  # wrong
cross_entropy(x, x, reduction=None)  # wrong
softmax(x, dim=-1)  # wrong
rope(x, x, x)  # wrong
print(swiglu(x, x).nothing)  # wrong
use_backend(3)  # wrong
kernels.SwiGLU(8)  # wrong
kernels.layer_norm(x)  # wrong
fastllm.load(3)  # wrong
fastllm.patch(x)  # wrong
fastllm.train()  # wrong
fastllm.finetune()  # wrong
