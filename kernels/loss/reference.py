"""Softmax and the losses on it, in plain PyTorch: the specifications."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(x: Tensor, *, scale: float = 1.0, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
        )
    if causal:
        rows, cols = x.shape[-2:]
        future = torch.ones(rows, cols, dtype=torch.bool, device=x.device).triu(cols - rows + 1)
        scores = scores.masked_fill(future, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0).to(x.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """``(loss, lse)``: the loss reduced as asked, and the log-sum-exp of each row."""
    valid = target != ignore_index
    every = torch.logsumexp(_capped(logits, softcap), -1)
    scores = _capped(logits.masked_fill(~valid.unsqueeze(-1), 0.0), softcap)  # an ignored row may hold inf or NaN
    lse = torch.logsumexp(scores, -1)
    index = target.masked_fill(~valid, 0).long()
    share = torch.ones_like(lse) if weight is None else weight.to(lse.dtype)[index]
    loss = (lse - scores.gather(-1, index.unsqueeze(-1)).squeeze(-1)) * share
    if label_smoothing:
        nll = lse.unsqueeze(-1) - scores
        smooth = nll.mean(-1) if weight is None else (nll * weight.to(lse.dtype)).sum(-1) / nll.shape[-1]
        loss = (1 - label_smoothing) * loss + label_smoothing * smooth
    loss, z = torch.where(valid, loss, 0.0), z_loss * torch.where(valid, lse, 0.0).square()
    if reduction == "mean":
        norm = normaliser(target, weight, ignore_index, lse.dtype)
        return loss.sum() / norm + z.sum() / normaliser(target, None, ignore_index, lse.dtype), every
    return (loss + z).sum() if reduction == "sum" else loss + z, every


def cross_entropy_of_probabilities(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The same of targets that are probabilities, ``[..., classes]``; the mean is over the rows."""
    scores = _capped(logits, softcap)
    lse = torch.logsumexp(scores, -1)
    nll = lse.unsqueeze(-1) - scores
    target = torch.lerp(target.to(nll.dtype), torch.full_like(nll, 1 / nll.shape[-1]), label_smoothing)
    loss = (target * nll if weight is None else target * nll * weight.to(nll.dtype)).sum(-1) + z_loss * lse.square()
    if reduction == "mean":
        return loss.sum() / max(1, loss.numel()), lse
    return loss.sum() if reduction == "sum" else loss, lse


def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """The generalised Jensen-Shannon divergence of logits ``[..., classes]``, with a gradient for the student's."""
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher.detach()))
    if mask is not None:  # a row that does not count may hold inf or NaN
        student, teacher = (x.masked_fill(~mask.unsqueeze(-1), 0.0) for x in (student, teacher))
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    if beta == 0:
        loss = _kl(log_p, log_q)
    elif beta == 1:
        loss = _kl(log_q, log_p)
    else:
        ruled_out = (log_q == float("-inf")) & (log_p == float("-inf"))
        log_m = torch.logaddexp(
            log_q.masked_fill(ruled_out, 0.0) + math.log1p(-beta), log_p.masked_fill(ruled_out, 0.0) + math.log(beta)
        )
        loss = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
    if reduction == "mean":
        return loss.sum() / (max(loss.numel(), 1) if mask is None else mask.count_nonzero().clamp(min=1))
    return loss.sum() if reduction == "sum" else loss


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q); what has no probability adds nothing, whatever q says of it."""
    p = log_p.exp()
    log_p, log_q = (x.masked_fill(p == 0, 0.0) for x in (log_p, log_q))
    return (p * (log_p - log_q)).sum(-1)


def normaliser(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean divides by: the weights of the valid targets; 1 where there is none, which leaves 0."""
    valid = target != ignore_index
    if weight is None:
        return torch.count_nonzero(valid).clamp(min=1).to(dtype)
    norm = torch.where(valid, weight.to(dtype)[target.masked_fill(~valid, 0).long()], 0.0).sum()
    return torch.where(norm == 0, 1.0, norm)


def log_prob(
    logits: Tensor, target: Tensor, *, softcap: float = 0.0, temperature: float = 1.0, ignore_index: int = -100
) -> Tensor:
    scores = _at_temperature(logits, target, softcap, temperature, ignore_index)
    return -cross_entropy(scores, target, ignore_index=ignore_index, reduction="none")[0]


def entropy(
    logits: Tensor, target: Tensor, *, softcap: float = 0.0, temperature: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """In nats, of the distribution of which :func:`log_prob` is a logarithm."""
    scores = _at_temperature(logits, target, softcap, temperature, ignore_index)
    log_p = torch.log_softmax(scores, -1)
    p = log_p.exp()
    terms = p * log_p.masked_fill(p == 0, 0.0)  # 0 * -inf counts 0
    return torch.where(target != ignore_index, -terms.sum(-1), 0.0)


def _at_temperature(logits: Tensor, target: Tensor, softcap: float, temperature: float, ignore_index: int) -> Tensor:
    known = logits.masked_fill((target == ignore_index).unsqueeze(-1), 0.0)  # an ignored row may hold inf or NaN
    scores = _capped(known, softcap)
    return scores if temperature == 1 else scores / temperature


def _capped(logits: Tensor, softcap: float) -> Tensor:
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(scores / softcap) if softcap else scores
