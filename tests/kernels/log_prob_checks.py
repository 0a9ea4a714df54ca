"""linear_log_prob against float64: what the tests in one process and in several share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import linear_log_prob
from fastllm.kernels.loss import reference

IGNORE = -100
NAMES = ("log_prob", "entropy", "dhidden", "dweight", "dbias")


def inputs(tokens: int, features: int, classes: int, dtype: torch.dtype, *, ignored: float = 0.2) -> list[Tensor]:
    """hidden, weight, bias, target."""
    hidden = torch.randn(tokens, features).to(dtype)
    weight, bias = (torch.randn(classes, features) / features**0.5).to(dtype), torch.randn(classes).to(dtype)
    target = torch.randint(classes, (tokens,))
    return [hidden, weight, bias, target.masked_fill(torch.rand(tokens) < ignored, IGNORE)]


def upstream(target: Tensor, way: str) -> list[Tensor]:
    """Gradients of log_prob and entropy; ``way`` is the one that has any, or "both"."""
    return [torch.randn(target.shape) * (way in (name, "both")) for name in NAMES[:2]]


def run(
    tensors: list[Tensor], grads: list[Tensor], way: str, cast: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients by name. What has no upstream gradient takes no part in the backward."""
    *leaves, target = tensors
    leaves = [x.detach().to(cast or x.dtype).requires_grad_() for x in leaves]
    out = linear_log_prob(*leaves[:2], target, bias=leaves[2], return_entropy=way != "log_prob", **options)
    out = dict(zip(NAMES, out if isinstance(out, tuple) else (out,), strict=False))
    known = [(out[name], g.to(cast or g.dtype)) for name, g in zip(NAMES, grads, strict=False) if way in (name, "both")]
    torch.autograd.backward(*zip(*known, strict=True))
    return {k: x.detach() for k, x in out.items()} | dict(zip(NAMES[2:], (x.grad for x in leaves), strict=True))


def terms(
    tensors: list[Tensor],
    grads: list[Tensor],
    chunk: int,
    *,
    softcap: float = 0.0,
    temperature: float = 1.0,
    ranks: int = 1,
) -> dict[str, Tensor]:
    """The magnitudes that each result adds up. The roundings between chunks are part of dweight's definition, those
    between ranks of dhidden's."""
    hidden, weight, bias = (x.double() for x in tensors[:3])
    target, pull, spread = tensors[3], *(g.double() for g in grads)
    logits = F.linear(hidden, weight, bias).requires_grad_()
    given = {"softcap": softcap, "temperature": temperature}
    entropy = reference.entropy(logits, target, **given)
    both = (reference.log_prob(logits, target, **given) * pull).sum() + (entropy * spread).sum()
    (dlogits,) = torch.autograd.grad(both, logits)
    logits, entropy = logits.detach(), entropy.detach().unsqueeze(-1)

    scores = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    lse, log_p = scores.logsumexp(-1, keepdim=True), scores.log_softmax(-1)
    # what the roundings of a score and of lse move log p by
    moves = F.linear(hidden.abs(), weight.abs(), bias.abs()) / temperature + scores.abs() + lse.abs()
    valid = (target != IGNORE).unsqueeze(-1)
    pull, spread = (g.abs().unsqueeze(-1) * valid for g in (pull, spread))
    by = log_p.exp() * (1 + moves) * (pull + spread * (1 + log_p.abs() + entropy))
    by = by.scatter_add(-1, target.masked_fill(target == IGNORE, 0).unsqueeze(-1), pull) / temperature
    if softcap:  # times 1 - t², and t is rounded, too
        by = by * (1 + 2 * (logits / softcap).square())

    coarse = torch.finfo(tensors[0].dtype).eps / torch.finfo(torch.float32).eps
    sums = torch.stack([g.t() @ h for g, h in zip(dlogits.split(chunk), hidden.split(chunk), strict=True)]).cumsum(0)
    parts = torch.stack([g @ w for g, w in zip(dlogits.chunk(ranks, 1), weight.chunk(ranks), strict=True)])
    return {
        "log_prob": moves.amax(-1),
        "entropy": (log_p.exp() * (1 + log_p.abs() + entropy) * (1 + moves)).sum(-1),
        "dhidden": by @ weight.abs() + (coarse * parts.abs().sum(0) if ranks > 1 else 0.0),
        "dweight": by.t() @ hidden.abs() + coarse * sums.abs().sum(0),
        "dbias": by.sum(0),
    }
