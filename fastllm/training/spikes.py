"""Loss spikes: detected on the device, from numbers that all ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SpikeConfig

MIN_VALUES = 32  # in the window before one of them can be a spike
MAD_TO_STD = 1.4826  # the standard deviation of a normal distribution, of its median absolute deviation
MIN_STD = (0.05, 0.5)  # the least that is assumed, as a share of the median: of the loss, of the gradient norm


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
    """Finds steps whose loss or gradient norm is not finite and, with ``sigma``, those far above the latest ones.

    Far: the loss and the gradient norm are both more than ``sigma`` standard deviations above their medians in the
    window. One of them alone is no spike: rare text (another script, another kind of document) has a high loss at a
    gradient norm of two or three times the usual, which clipping bounds. The deviation comes from the median absolute
    deviation, which the heavy tails of small batches don't move, and is at least ``MIN_STD`` of the median. OLMo 2
    (arXiv:2501.00656) skips updates where either is six standard deviations above the mean.

    A spike enters the window as the limit that it exceeded, so a lasting change becomes usual in time. Nothing here
    waits for the device: ``step`` returns a tensor.
    """

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self.config = config
        self.values = torch.full((2, config.window), torch.nan, device=device)  # loss and norm; a ring buffer
        self.recent = torch.zeros(config.window, device=device)  # 1: that step was a spike
        self.count = torch.zeros((), device=device)  # all spikes so far
        self.last_spike = torch.full((2,), torch.nan, device=device)  # its loss and norm
        self._min_std = torch.tensor(MIN_STD, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the tensors themselves."""
        return {"values": self.values, "recent": self.recent, "count": self.count, "last_spike": self.last_spike}

    @torch.no_grad()
    def step(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """float32, 0-d: 1 where this step is a spike, else 0. ``loss`` and ``grad_norm`` are the same on all ranks."""
        now = torch.stack((loss, grad_norm))
        limit = self._limit()
        spike = ~now.isfinite().all() | (now > limit).all()

        slot = step % self.config.window
        entered = torch.where(spike, torch.minimum(now.nan_to_num(torch.inf, torch.inf, torch.inf), limit), now)
        self.values[:, slot] = torch.where(entered.isfinite(), entered, torch.nan)
        found = spike.float()
        self.recent[slot] = found
        self.count += found
        self.last_spike.copy_(torch.where(spike, now, self.last_spike))
        return found

    def _limit(self) -> Tensor:
        """``[2]``: above these, loss and gradient norm are far above the latest ones; infinite while few are known."""
        if not self.config.sigma:
            return torch.full_like(self._min_std, torch.inf)
        median = self.values.nanmedian(1).values
        mad = (self.values - median[:, None]).abs().nanmedian(1).values
        limit = median + self.config.sigma * torch.maximum(MAD_TO_STD * mad, self._min_std * median.abs())
        return torch.where(self.values.isfinite().sum(1) >= MIN_VALUES, limit, torch.inf)

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
