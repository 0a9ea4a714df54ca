"""Optimizers and the learning rate along a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import OptimConfig


def make_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """What updates the parameters of a GPT (DTensors of FSDP2 too), each once.

    - "adamw": AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), fused, with weight decay on matrices only.
    - "muon": Muon (Jordan 2024) for the matrices of the blocks, scaled so that AdamW's learning rate and weight decay
      serve (Liu et al. 2025, arXiv:2502.16982); AdamW for the embedding, the head and what is no matrix.
    """
    named = list(model.named_parameters())
    by_muon = {n for n, p in named if p.dim() == 2 and ".layers." in n} if config.optimizer == "muon" else set()
    rest = [p for n, p in named if n not in by_muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )
    if not by_muon:
        return [adamw]
    matrices = [p for n, p in named if n in by_muon]
    muon = torch.optim.Muon(
        matrices, lr=config.lr, momentum=0.95, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw]


def step(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """One update at the learning rate ``lr``; the gradients are dropped."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


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
