"""The guard against spikes: decided on the device, from numbers that all processes share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import GuardConfig

QUIET = 32  # values in the window before one of them can be called a spike
SPREAD = 0.05  # of the mean: the least that a standard deviation is taken for


class Guard:
    """Watches loss and gradient norm; a spike is what is not finite, or far above the window of latest values.

    Far: more than ``sigma`` standard deviations above the mean, as in OLMo 2 (arXiv:2501.00656), which leaves such
    updates out too. A spike enters the window as the limit that it broke, so that one does not hide the next and a
    lasting change is taken for granted in time. Nothing here waits for the device: ``step`` returns a tensor.
    """

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.values = torch.full((2, config.window), torch.nan, device=device)  # loss and norm; a ring
        self.spikes = torch.zeros(config.window, device=device)  # 1: that step was one
        self.count = torch.zeros((), device=device)  # of all spikes so far
        self.worst = torch.full((2,), torch.nan, device=device)  # loss and norm of the last spike

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the tensors themselves."""
        return {"values": self.values, "spikes": self.spikes, "count": self.count, "worst": self.worst}

    @torch.no_grad()
    def step(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """float32 0-d: 1 where this step is a spike, else 0. ``loss`` and ``norm`` are the same on all processes."""
        now = torch.stack((loss, norm))
        known = self.values.isfinite()
        count = known.sum(1)
        mean = self.values.nan_to_num(0.0).sum(1) / count.clamp(min=1)
        spread = (torch.where(known, self.values - mean[:, None], 0.0).square().sum(1) / count.clamp(min=1)).sqrt()
        limit = mean + self.config.sigma * torch.maximum(spread, SPREAD * mean.abs())
        limit = torch.where(count >= QUIET, limit, torch.inf)
        spike = ~((now <= limit) & now.isfinite()).all()  # NaN is not <= anything

        slot = step % self.config.window
        entered = torch.minimum(now.nan_to_num(torch.inf, torch.inf, torch.inf), limit)
        self.values[:, slot] = torch.where(entered.isfinite(), entered, torch.nan)
        found = spike.float()
        self.spikes[slot] = found
        self.count += found
        self.worst.copy_(torch.where(spike, now, self.worst))
        return found

    def report(self) -> tuple[int, int, tuple[float, float], tuple[float, float]]:
        """Spikes so far, spikes in the window, loss and norm of the last one and their usual values. Waits."""
        usual = self.values.nanmedian(1).values
        numbers = torch.cat((self.count[None], self.spikes.sum()[None], self.worst, usual)).tolist()
        return int(numbers[0]), int(numbers[1]), (numbers[2], numbers[3]), (numbers[4], numbers[5])
