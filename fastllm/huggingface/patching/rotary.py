"""Rotary positions: the forward of an attention, calling our kernel where it calls ``apply_rotary_pos_emb``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import rope
from .exchange import exchanged
from .finding import Finding, class_forward, same, why_different
from .swap import step, taken

NAME = "apply_rotary_pos_emb"  # what transformers calls it in every file that has it


def looks_rotary(module: nn.Module) -> bool:
    return NAME in inspect.unwrap(class_forward(module)).__code__.co_names


def find_rotary(name: str, module: nn.Module, untried: str | None) -> Finding:
    kind, function = type(module).__name__, _globals(module).get(NAME) if looks_rotary(module) else None
    if function is None:
        return Finding("rotary", name, kind, f"it does not call {NAME}", disagrees=True)
    if untried or taken(module):
        return Finding("rotary", name, kind, untried or taken(module))
    if _rotary_differs(module, function):
        why_not = "its rotary function turns other pairs, or does something else"
        return Finding("rotary", name, kind, why_not, disagrees=True)
    return Finding("rotary", name, kind, "rope", ((module, step(rope_forward)),))


def rope_forward(original: Callable) -> Callable:
    return exchanged(original, "rope", {NAME: _ours})


def _ours(original: Callable) -> Callable:
    @functools.wraps(original)
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        """Of q, k, cos, sin: other calls (of the queries alone) are theirs."""
        unsqueeze_dim = kwargs.get("unsqueeze_dim", 1)
        if len(args) == 4 and kwargs.keys() <= {"unsqueeze_dim"} and unsqueeze_dim in (1, 2) and args[2].dim() == 3:
            return apply_rope(*args, unsqueeze_dim)
        return original(*args, **kwargs)

    return apply_rotary_pos_emb


def _globals(module: nn.Module) -> dict[str, Any]:
    return inspect.unwrap(class_forward(module)).__globals__


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' ``apply_rotary_pos_emb`` on :func:`rope`.

    q, k ``[batch, heads, seq, head_dim]``, or with ``unsqueeze_dim=2`` ``[batch, seq, heads, head_dim]``; cos, sin
    ``[batch or 1, seq, rotary_dim]``, whose second half repeats the first.
    """
    heads_first = unsqueeze_dim == 1
    if heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    batch, seq = cos.shape[:2]
    positions = None
    if batch > 1:  # each sequence counts its positions by itself: one table of all
        positions = torch.arange(batch * seq, device=q.device).view(batch, seq)
    cos, sin = (t.flatten(0, 1)[:, : t.shape[-1] // 2] for t in (cos, sin))
    if cos.dtype != q.dtype:
        cos, sin = cos.float(), sin.float()
    q, k = rope(q, k, cos, sin, positions=positions)
    return (q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)


def _rotary_differs(module: nn.Module, function: Callable) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    angle = torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2)

    def trial(training: bool, dtype: torch.dtype, magnitude: float) -> bool:
        given = [t.to(dtype) for t in (magnitude * q, magnitude * k, angle.cos(), angle.sin())]
        return all(same(*pair) for pair in zip(apply_rope(*given), function(*given), strict=True))

    return why_different(module, trial)
