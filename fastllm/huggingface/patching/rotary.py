"""Rotary positions by our kernel, in the attentions of patched modules alone.

Each modeling file of transformers calls its rotary function by a global name, from more than a hundred different
forwards of attention. Writing each of them again would be a hundred places to go wrong; replacing the function for
good, as others do, changes every model of the process. So the name is given to a function that chooses: while the
forward of a patched module runs, in the thread that runs it, our kernel; otherwise the function that was there.
The flag is a ``threading.local``, which ``torch.compile`` traces (it does not trace a ContextVar); gradient
checkpointing calls the forward again, and thus sets it again. The name gets its own function back when no patched
module needs the other one.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import rope
from .finding import Finding, class_forward, names_in, same, why_different
from .swap import step, taken

NAME = "apply_rotary_pos_emb"  # what transformers calls it in every file that has it


class _Flag(threading.local):
    patched = False


_flag = _Flag()
_users: dict[str, weakref.WeakSet[nn.Module]] = {}  # patched modules, by the modeling file
_lock = threading.Lock()


def looks_rotary(module: nn.Module) -> bool:
    return NAME in names_in(class_forward(module))


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
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = _flag.patched
        _flag.patched = True
        try:
            return original(self, *args, **kwargs)
        finally:
            _flag.patched = before

    return forward


def _patched(module: nn.Module) -> None:
    names = _globals(module)
    with _lock:
        _users.setdefault(names["__name__"], weakref.WeakSet()).add(module)
        if not isinstance(getattr(names[NAME], "instead_of", None), Callable):
            names[NAME] = _choosing(names[NAME])


def _unpatched(module: nn.Module) -> None:
    names = _globals(module)
    with _lock:
        users = _users[names["__name__"]]
        users.discard(module)
        if not users:
            names[NAME] = getattr(names[NAME], "instead_of", names[NAME])


rope_forward.patched, rope_forward.unpatched = _patched, _unpatched


def _choosing(original: Callable) -> Callable:
    @functools.wraps(original)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, unsqueeze_dim: int = 1, **kwargs: Any
    ) -> Any:
        ours = _flag.patched and cos.dim() == 3 and unsqueeze_dim in (1, 2) and not args and not kwargs
        if ours:
            return apply_rope(q, k, cos, sin, unsqueeze_dim)
        return original(q, k, cos, sin, *args, unsqueeze_dim=unsqueeze_dim, **kwargs)

    apply_rotary_pos_emb.instead_of = original
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
    function = getattr(function, "instead_of", function)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    angle = torch.randn(2, 5, 4, generator=generator).repeat(1, 1, 2)

    def trial(training: bool, dtype: torch.dtype, magnitude: float) -> bool:
        given = [t.to(dtype) for t in (magnitude * q, magnitude * k, angle.cos(), angle.sin())]
        return all(same(*pair) for pair in zip(apply_rope(*given), function(*given), strict=True))

    return why_different(module, trial)
