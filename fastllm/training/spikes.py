"""Loss spikes: detected on the device, from numbers that all ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SpikeConfig

MIN_VALUES = 32  # in the window before one of them can be a spike
MIN_RELATIVE_STD = 0.05  # of the mean: the least standard deviation that is assumed


@dataclass(frozen=True)
class SpikeReport:
    """Spikes so far, spikes in the window, loss and gradient norm of the last spike, and what is usual."""

    count: int
    recent: int
    loss: float
    grad_norm: float
    usual_loss: float
    usual_grad_norm: float

    def describe(self) -> str:
        return (
            f"loss {self.loss:.4g} and gradient norm {self.grad_norm:.4g} "
            f"(usual: {self.usual_loss:.4g} and {self.usual_grad_norm:.4g})"
        )


class SpikeDetector:
    """Finds steps whose loss or gradient norm is not finite, or far above a window of the latest values.

    Far: more than ``sigma`` standard deviations above the mean, as in OLMo 2 (arXiv:2501.00656), which skips such
    updates too. A spike enters the window as the limit that it exceeded. So one spike does not hide the next, and a
    lasting change becomes the norm in time. Nothing here waits for the device: ``step`` returns a tensor.
    """

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self.config = config
        self.values = torch.full((2, config.window), torch.nan, device=device)  # loss and norm; a ring buffer
        self.recent = torch.zeros(config.window, device=device)  # 1: that step was a spike
        self.count = torch.zeros((), device=device)  # all spikes so far
        self.last_spike = torch.full((2,), torch.nan, device=device)  # its loss and norm

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the tensors themselves."""
        return {"values": self.values, "recent": self.recent, "count": self.count, "last_spike": self.last_spike}

    @torch.no_grad()
    def step(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """float32, 0-d: 1 where this step is a spike, else 0. ``loss`` and ``grad_norm`` are the same on all ranks."""
        now = torch.stack((loss, grad_norm))
        known = self.values.isfinite()
        count = known.sum(1)
        mean = self.values.nan_to_num(0.0).sum(1) / count.clamp(min=1)
        std = (torch.where(known, self.values - mean[:, None], 0.0).square().sum(1) / count.clamp(min=1)).sqrt()
        limit = mean + self.config.sigma * torch.maximum(std, MIN_RELATIVE_STD * mean.abs())
        limit = torch.where(count >= MIN_VALUES, limit, torch.inf)
        spike = ~((now <= limit) & now.isfinite()).all()  # NaN is not <= anything

        slot = step % self.config.window
        entered = torch.minimum(now.nan_to_num(torch.inf, torch.inf, torch.inf), limit)
        self.values[:, slot] = torch.where(entered.isfinite(), entered, torch.nan)
        found = spike.float()
        self.recent[slot] = found
        self.count += found
        self.last_spike.copy_(torch.where(spike, now, self.last_spike))
        return found

    def report(self) -> SpikeReport:
        """Waits for the device."""
        usual = self.values.nanmedian(1).values
        numbers = torch.cat((self.count[None], self.recent.sum()[None], self.last_spike, usual)).tolist()
        return SpikeReport(int(numbers[0]), int(numbers[1]), *numbers[2:])

    @contextmanager
    def keep_counts(self) -> Iterator[None]:
        """Whatever the block restores, the spikes counted so far stay counted."""
        kept = [(tensor, tensor.clone()) for tensor in (self.count, self.recent)]
        yield
        for tensor, value in kept:
            tensor.copy_(value)
