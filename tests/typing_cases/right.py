"""A user's program with each public call: mypy and pyright pass it strictly, and every result has its type."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import fastllm
from fastllm import GPT, Config, ModelConfig, Tokenizer
from fastllm.huggingface.patching import PatchReport
from fastllm.kernels import (
    BACKENDS,
    CausalSelfAttention,
    CrossEntropyLoss,
    Explanation,
    LinearCrossEntropyLoss,
    RMSNorm,
    SwiGLU,
    cross_entropy,
    explain,
    flash_attention,
    flash_decode,
    linear_cross_entropy,
    linear_jsd,
    linear_log_prob,
    rms_norm,
    rope,
    rope_append,
    softmax,
    swiglu,
    use_backend,
)


def ops(x: Tensor, weight: Tensor, target: Tensor, maybe: Tensor | None, flag: bool) -> None:
    assert_type(rms_norm(x), Tensor)
    assert_type(rms_norm(x, weight, eps=1e-5, weight_offset=1.0, backend="torch"), Tensor)
    assert_type(rms_norm(x, weight, residual=x), tuple[Tensor, Tensor])
    assert_type(rms_norm(x, residual=maybe), Tensor | tuple[Tensor, Tensor])
    y, h = rms_norm(x, weight, residual=x)
    assert_type(y + h, Tensor)

    assert_type(flash_attention(x, x, x), Tensor)
    assert_type(flash_attention(x, x, x, causal=False, scale=0.1, softcap=1.0, return_lse=False), Tensor)
    assert_type(flash_attention(x, x, x, cu_seqlens_q=target, max_seqlen_q=3, return_lse=True), tuple[Tensor, Tensor])
    assert_type(flash_attention(x, x, x, window=4, sinks=maybe, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(flash_attention(x, x, x, window=(4, None), layout="bhsd"), Tensor)
    assert_type(flash_decode(x, x, x, target, causal=False), Tensor)
    assert_type(flash_decode(x, x, x, return_lse=True, window=3), tuple[Tensor, Tensor])
    assert_type(flash_decode(x, x, x, target, block_table=target), Tensor)
    assert_type(rope_append(x, x, x, x, x, target, x, x, target, interleaved=True), Tensor)
    assert_type(flash_decode(x, x, x, return_lse=flag), Tensor | tuple[Tensor, Tensor])

    assert_type(cross_entropy(x, target), Tensor)
    assert_type(cross_entropy(x, target, weight=maybe, reduction="none", ignore_index=-1), Tensor)
    assert_type(cross_entropy(x, target, z_loss=1e-4, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cross_entropy(x, target, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(linear_cross_entropy(x, weight, target, bias=maybe), Tensor)
    assert_type(linear_cross_entropy(x, weight, target, return_lse=True), tuple[Tensor, Tensor])
    assert_type(linear_cross_entropy(x, weight, target, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(linear_log_prob(x, weight, target, ignore_index=0, softcap=30.0, temperature=0.7), Tensor)
    assert_type(linear_log_prob(x, weight, target, return_entropy=True), tuple[Tensor, Tensor])
    assert_type(linear_log_prob(x, weight, target, return_entropy=flag), Tensor | tuple[Tensor, Tensor])

    assert_type(linear_jsd(x, weight, x, weight, bias=maybe, mask=maybe, beta=0.1, reduction="none"), Tensor)

    assert_type(softmax(x, scale=0.5, causal=True, mask=maybe), Tensor)
    assert_type(rope(x, x, weight, weight, interleaved=True, positions=target), tuple[Tensor, Tensor])
    assert_type(swiglu(x, x), Tensor)


def choice(x: Tensor) -> None:
    assert_type(explain(rms_norm, x, residual=x), Explanation)
    assert_type(explain("softmax", x, backend="cpu").chosen, str)
    names: tuple[str, ...] = BACKENDS
    assert_type(fastllm.kernels.explain(names[0], x).reasons, dict[str, str])
    with use_backend("triton"), use_backend(None):
        fastllm.kernels.swiglu(x, x)


def modules(x: Tensor, target: Tensor) -> list[nn.Module]:
    norm = RMSNorm(8, 1e-5, weight_offset=1.0, device="cpu", dtype=torch.float32)
    assert_type(norm.forward(x), Tensor)
    assert_type(norm.forward(x, x), tuple[Tensor, Tensor])
    assert_type(SwiGLU(8, 16, bias=True).forward(x), Tensor)
    assert_type(CausalSelfAttention(8, 2, 1, qk_norm=True, window=3).forward(x, x, x, positions=target), Tensor)
    assert_type(CrossEntropyLoss(label_smoothing=0.1).forward(x, target), Tensor)
    assert_type(LinearCrossEntropyLoss(8, 16, accumulate_float32=True).forward(x, target), Tensor)
    return [norm]


def models(folder: Path, model: nn.Module) -> int:
    assert_type(fastllm.load(folder, "cpu"), tuple[GPT, Tokenizer])
    assert_type(fastllm.from_pretrained(folder, dtype=torch.bfloat16), GPT)
    assert_type(fastllm.export("runs/gpt2", folder, dtype=torch.float16), Path)
    assert_type(fastllm.patch(model, parts=("norm", "loss")), PatchReport)
    fastllm.unpatch(model)
    with fastllm.patched(model, unknown="probe") as report:
        assert_type(report, PatchReport)
    assert_type(fastllm.__version__, str)
    return fastllm.train(Config(model=ModelConfig(dim=64)), folder, resume=True)
