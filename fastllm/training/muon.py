"""The Muon optimizer: momentum whose update is orthogonalized."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..dtensor import local_slice, to_local
from ..kernels.native import multiplies_bfloat16

# Of the quintic Newton-Schulz iteration (Jordan 2024, https://kellerjordan.github.io/posts/muon/).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum, for matrices. Each update is scaled to the RMS of AdamW's.

    The scale, 0.2·sqrt(max(rows, columns)), lets AdamW's learning rate and weight decay serve (Liu et al. 2025,
    arXiv:2502.16982). Unlike ``torch.optim.Muon`` it shares out the work: one rank orthogonalizes each matrix and
    broadcasts it. Like the fused AdamW it takes ``grad_scale`` and ``found_inf``, 0-d tensors on the device or None:
    gradients are divided by the first; where the second is 1, nothing changes.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        owned: list[Tensor | None] = []  # by this rank; None: another rank's
        todo = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for i, (p, group) in enumerate(todo):
            full = self._momentum(p, group["momentum"])
            owned.append(orthogonalize(full).contiguous() if i % world == rank else None)
        taken = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        for i, (p, group) in enumerate(todo):
            update, owned[i] = owned[i], None
            if isinstance(p, DTensor) and world > 1:
                if update is None:
                    update = torch.empty(p.shape, dtype=compute_dtype(p.device), device=p.device)
                dist.broadcast(update, i % world)
                update = update[local_slice(p)]
            assert update is not None
            size = group["lr"] * 0.2 * math.sqrt(max(p.shape))
            to_local(p).mul_(1.0 - group["lr"] * group["weight_decay"] * taken).sub_(update * (size * taken))

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Update the average of the gradients; the full matrix to orthogonalize."""
        assert p.grad is not None
        state, grad = self.state[p], to_local(p.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = to_local(state["momentum_buffer"])
        weight: float | Tensor = 1.0 - momentum
        if self.grad_scale is not None:
            grad.div_(self.grad_scale)
        if self.found_inf is not None:
            grad.masked_fill_(self.found_inf > 0, 0.0)  # it may not be finite
            weight = weight * (1.0 - self.found_inf)
        average.lerp_(grad, weight)
        update = grad.lerp(average, momentum).to(compute_dtype(p.device))
        if isinstance(p, DTensor):
            return DTensor.from_local(
                update, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            ).full_tensor()
        return update


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, except on CPUs that would emulate it."""
    return torch.float32 if device.type == "cpu" and not multiplies_bfloat16() else torch.bfloat16


def orthogonalize(matrix: Tensor) -> Tensor:
    """Approximates the orthogonal matrix nearest to ``matrix`` ``[rows, columns]``: singular values of 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
