"""Optimizers and the learning rate along a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OptimConfig
from .muon import Muon


def make_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """What updates the parameters of a GPT (DTensors of FSDP2 too), each once.

    - "adamw": AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), fused, with weight decay on matrices only.
    - "muon": :class:`Muon` for the matrices of the blocks; AdamW for the embedding, the head and what is no matrix.
    """
    named = list(model.named_parameters())
    by_muon = {n for n, p in named if p.dim() == 2 and ".layers." in n} if config.optimizer == "muon" else set()
    groups: dict[tuple[bool, Any], dict[str, Any]] = {}  # fused kernels take DTensors of one mesh
    for p in (p for n, p in named if n not in by_muon):
        key = (p.dim() >= 2, getattr(p, "device_mesh", None))
        group = groups.setdefault(key, {"params": [], "weight_decay": config.weight_decay if key[0] else 0.0})
        group["params"].append(p)
    adamw = torch.optim.AdamW(
        list(groups.values()), lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )
    if not by_muon:
        return [adamw]
    matrices = [p for n, p in named if n in by_muon]
    return [Muon(matrices, lr=config.lr, weight_decay=config.weight_decay), adamw]


def step(
    optimizers: list[torch.optim.Optimizer], lr: float, divisor: Tensor | None = None, skip: Tensor | None = None
) -> None:
    """One update at the learning rate ``lr``; the gradients are dropped.

    ``divisor``, ``skip``: 0-d tensors on the device: gradients are divided by the first; where the second is 1, neither
    parameters nor the optimizers' state change. The host waits for neither.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Fused optimizers read these, as torch.amp.GradScaler hands them over.
        optimizer.grad_scale, optimizer.found_inf = divisor, skip
        optimizer.step()
        optimizer.zero_grad()


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state by parameter name, ``model.norm.weight.exp_avg``: the tensors themselves.

    State that no step has made yet is made.
    """
    if not all(optimizer.state for optimizer in optimizers):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        one = torch.ones((), device=next(model.parameters()).device)
        step(optimizers, 0.0, one, skip=one)
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def learning_rate(config: OptimConfig, progress: float) -> float:
    """At ``progress``, from 0 to 1, through the run: a linear rise over the warm-up, then the schedule.

    - "wsd": constant, and over the last ``decay`` of the run a line to the end (warm-up, stable, decay; Hu et al. 2024,
      arXiv:2404.06395).
    - "linear": a line from the peak to the end.
    - "cosine": half a cosine from the peak to the end (arXiv:1608.03983).

    The end is ``final`` times the peak.
    """
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    start = 1.0 - config.decay if config.schedule == "wsd" else config.warmup
    done = min(1.0, max(0.0, (progress - start) / (1.0 - start))) if start < 1.0 else 0.0
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.lr * (config.final + (1.0 - config.final) * left)
