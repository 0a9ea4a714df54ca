"""Optimizers and learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OptimConfig
from .muon import Muon


def make_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a GPT, sharded or not; each parameter that requires a gradient belongs to one.

    - "adamw": AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), fused, with weight decay on matrices only.
    - "muon": :class:`Muon` for the matrices of the blocks; AdamW for the embedding, the head and vectors.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
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
    optimizers: list[torch.optim.Optimizer],
    lr: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One update at the learning rate ``lr``; then the gradients are freed.

    Gradients are divided by ``grad_scale``. Where ``found_inf`` is 1, neither parameters nor optimizer state change.
    Both are 0-d tensors on the device, and the host waits for neither.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Fused optimizers read these, which torch.amp.GradScaler sets too.
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = grad_scale, found_inf
        optimizer.step()
        optimizer.zero_grad()


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state by parameter name, ``model.norm.weight.exp_avg``: the tensors themselves.

    Creates the state where no step has been taken yet.
    """
    if not all(optimizer.state for optimizer in optimizers):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        one = torch.ones((), device=next(model.parameters()).device)
        step(optimizers, 0.0, grad_scale=one, found_inf=one)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def learning_rate(config: OptimConfig, progress: float) -> float:
    """At ``progress``, from 0 to 1, through the run: linear warmup to the peak, then the schedule.

    - "wsd": constant, then linear decay over the last ``decay_ratio`` of the run (warmup-stable-decay; Hu et al. 2024,
      arXiv:2404.06395).
    - "linear": linear decay from the peak to the end.
    - "cosine": half a cosine from the peak to the end (arXiv:1608.03983).

    The run ends at ``min_lr_ratio`` times the peak.
    """
    if progress < config.warmup_ratio:
        return config.lr * progress / config.warmup_ratio
    start = 1.0 - config.decay_ratio if config.schedule == "wsd" else config.warmup_ratio
    done = min(1.0, max(0.0, (progress - start) / (1.0 - start))) if start < 1.0 else 0.0
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)
