"""RMSNorm, gated MLPs and rotary positions: recognised by what they compute, not by what they are called.

A module that has the structure is tried on random numbers against the kernel, on a small stand-in; only where both
give the same is it replaced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import rms_norm, rope, swiglu
from .finding import Finding, class_forward, names_in, replaced_forward, same, stand_in, taken, with_globals

# ---- norms ----


def find_norm(name: str, module: nn.Module) -> Finding | None:
    kind = type(module).__name__
    eps = next((e for e in (getattr(module, a, None) for a in ("variance_epsilon", "eps")) if e is not None), None)
    alone = not module._modules and {k for k, p in module._parameters.items() if p is not None} <= {"weight"}
    candidates = [_norm_forward(eps, offset) for offset in (0.0, 1.0)] if alone and eps is not None else []
    forward = next((f for f in candidates if _agrees_on_norm(module, f)), None)
    if forward is None:
        why_not = "it is no RMSNorm with a weight (or a weight plus 1) and an eps"
        return Finding("norm", name, kind, why_not) if "norm" in kind.lower() and not module._modules else None
    why_not = taken(module)
    changes = () if why_not else (replaced_forward(module, forward),)
    return Finding("norm", name, kind, why_not or "rms_norm", changes)


@functools.cache
def _norm_forward(eps: float, weight_offset: float) -> Callable:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, getattr(self, "weight", None), eps=eps, weight_offset=weight_offset)

    return forward


def _agrees_on_norm(module: nn.Module, forward: Callable) -> bool:
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() != 1:
        return False
    columns = 16 if weight is None else weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(3, columns, generator=generator)  # small: eps counts
    parts = {} if weight is None else {"weight": nn.Parameter(torch.rand(columns, generator=generator))}
    return _same_result(module, forward, stand_in(module, **parts), x)


# ---- gated MLPs ----

_ACTIVATIONS = {"act_fn", "activation_fn", "act"}
_SEPARATE, _JOINED = {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}


def find_mlp(name: str, module: nn.Module) -> Finding | None:
    kind, children = type(module).__name__, set(module._modules) - _ACTIVATIONS
    if children not in (_SEPARATE, _JOINED):
        why_not = "it is no gated MLP of the projections gate, up and down alone"
        return Finding("mlp", name, kind, why_not) if kind.endswith("MLP") else None
    forward = _separate_mlp if children == _SEPARATE else _joined_mlp
    why_not = taken(module)
    if not why_not and not _agrees_on_mlp(module, forward):
        act = next(
            (type(a).__name__ for a in (getattr(module, a, None) for a in _ACTIVATIONS) if a is not None), "none"
        )
        why_not = f"it does not compute down(silu(gate) · up); its activation is {act}"
    changes = () if why_not else (replaced_forward(module, forward),)
    return Finding("mlp", name, kind, why_not or "swiglu", changes)


def _separate_mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


def _joined_mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_up_proj(hidden_states).chunk(2, -1)
    return self.down_proj(swiglu(gate, up))


def _agrees_on_mlp(module: nn.Module, forward: Callable) -> bool:
    dim, hidden = 8, 16
    joined = forward is _joined_mlp
    ins = {"gate_up_proj": 2 * hidden} if joined else {"gate_proj": hidden, "up_proj": hidden}
    parts = {child: nn.Linear(dim, out) for child, out in ins.items()} | {"down_proj": nn.Linear(hidden, dim)}
    generator = torch.Generator().manual_seed(0)
    for part in parts.values():
        for p in part.parameters():
            p.data = torch.randn(p.shape, generator=generator)
    return _same_result(module, forward, stand_in(module, **parts), torch.randn(2, 3, dim, generator=generator))


@torch.no_grad()
def _same_result(module: nn.Module, forward: Callable, twin: nn.Module, x: Tensor) -> bool:
    try:
        return same(forward(twin, x), class_forward(module)(twin, x))
    except Exception:  # whatever a foreign forward raises on our stand-in: it is another structure
        return False


# ---- rotary positions ----

_ROTARY = "apply_rotary_pos_emb"  # what transformers calls it in every file that has it


def find_rotary(name: str, module: nn.Module) -> Finding | None:
    forward, kind = class_forward(module), type(module).__name__
    function = _rotary_function(forward)
    if function is None:
        return None
    why_not = taken(module) or _rotary_differs(function)
    changes = () if why_not else (replaced_forward(module, _with_rope(forward)),)
    return Finding("rotary", name, kind, why_not or "rope", changes)


def _rotary_function(forward: Callable) -> Callable | None:
    if _ROTARY not in names_in(forward):
        return None
    return inspect.unwrap(forward).__globals__.get(_ROTARY)


@functools.cache
def _with_rope(forward: Callable) -> Callable:
    return with_globals(forward, **{_ROTARY: apply_rope})


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


@functools.cache
@torch.no_grad()
def _rotary_differs(function: Callable) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    angle = torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2)
    tables = (angle.cos(), angle.sin())
    try:
        pairs: Any = zip(apply_rope(q, k, *tables), function(q, k, *tables), strict=True)
        agree = all(same(*pair) for pair in pairs)
    except Exception:  # as above
        agree = False
    return None if agree else "its rotary function turns other pairs, or does something else"
