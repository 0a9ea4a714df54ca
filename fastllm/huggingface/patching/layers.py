"""RMSNorm and gated MLPs: the new forwards, and the trial that confirms that a module computes what they do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import rms_norm, swiglu
from .finding import Finding, class_forward, same, settings_of, stand_in, why_different
from .swap import Step, hooked, step, taken

# ---- norms ----

_EPS = ("variance_epsilon", "eps", "epsilon")


def looks_like_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not module._modules


def find_norm(
    name: str, module: nn.Module, untried: str | None, weight_offsets: tuple[float, ...] = (0.0, 1.0)
) -> Finding:
    kind, eps = type(module).__name__, next((e for e in _EPS if getattr(module, e, None) is not None), None)
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    alone = not module._modules and parameters.keys() <= {"weight"} and all(p.dim() == 1 for p in parameters.values())
    why_not = "it is no RMSNorm with a weight (or a weight plus 1) and an eps"
    if not alone or eps is None or isinstance(module, nn.LayerNorm) or _arguments(module) != 2:
        return Finding("norm", name, kind, why_not, disagrees=True)
    if untried or taken(module):
        return Finding("norm", name, kind, untried or taken(module))
    for offset in weight_offsets:
        each = step(rms_norm_forward, eps=eps, weight_offset=offset)
        if _norm_differs(module, each) is None:
            return Finding("norm", name, kind, "rms_norm", ((module, each),))
    return Finding("norm", name, kind, why_not, disagrees=True)


def rms_norm_forward(original: Callable, *, eps: str, weight_offset: float) -> Callable:
    """``eps`` names the attribute that holds it."""

    @functools.wraps(original)
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight = getattr(self, "weight", None)
        mixed = weight is not None and weight.dtype != hidden_states.dtype
        if mixed and not torch.is_autocast_enabled(hidden_states.device.type):
            return original(self, hidden_states)  # the classes differ in what dtype they then give
        return rms_norm(hidden_states, weight, eps=getattr(self, eps), weight_offset=weight_offset)

    return forward


def _norm_differs(module: nn.Module, each: Step) -> str | None:
    weight = module._parameters.get("weight")
    columns = 16 if weight is None else weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(3, columns, generator=generator), torch.rand(columns, generator=generator)

    def trial(training: bool, dtype: torch.dtype, magnitude: float) -> bool:
        parts = {} if weight is None else {"weight": nn.Parameter(scale.to(dtype))}
        return _same_result(module, each, stand_in(module, **parts), training, (magnitude * x).to(dtype))

    return why_different(module, trial)


# ---- gated MLPs ----

_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_SEPARATE, _JOINED = {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}


def _projections(module: nn.Module) -> set[str]:
    return {name for name, child in module._modules.items() if isinstance(child, nn.Module)} - {*_ACTIVATIONS}


def looks_like_mlp(module: nn.Module) -> bool:
    projections = _projections(module)
    return projections >= _SEPARATE or projections >= _JOINED or type(module).__name__.endswith("MLP")


def find_mlp(name: str, module: nn.Module, untried: str | None) -> Finding:
    kind, projections = type(module).__name__, _projections(module)
    act = next((a for a in (getattr(module, attribute, None) for attribute in _ACTIVATIONS) if a is not None), None)
    own = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
    if not (projections >= _SEPARATE or projections >= _JOINED) or _arguments(module) != 2 or own:
        why_not = "it is no gated MLP of the projections gate, up and down alone"
        return Finding("mlp", name, kind, why_not, disagrees=True)
    if untried or taken(module):
        return Finding("mlp", name, kind, untried or taken(module))
    each = step(
        swiglu_forward,
        joined="gate_up_proj" in projections,
        passed=_passed(module),
        settings=settings_of(module, (module,)),
    )
    reason = _mlp_differs(module, each)
    if reason:
        activation = "none" if act is None else getattr(act, "__name__", type(act).__name__)
        why_not = f"it does not compute down(silu(gate) · up): {reason}; its activation is {activation}"
        return Finding("mlp", name, kind, why_not, disagrees=True)
    return Finding("mlp", name, kind, "swiglu", ((module, each),))


def _passed(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What swiglu does not call: the activation, and children that do nothing, each by its class or as a function."""
    projections = _JOINED if "gate_up_proj" in module._modules else _SEPARATE
    children = [(name, type(child)) for name, child in module._modules.items() if name not in projections and child]
    return (*children, *((name, vars(module)[name]) for name in _ACTIVATIONS if name in vars(module)))


def _as_tried(module: nn.Module, passed: tuple[tuple[str, Any], ...], settings: tuple[tuple[str, Any], ...]) -> bool:
    """No hook, replacement or setting since, that swiglu would pass over."""
    for name, kind in passed:
        child = module._modules.get(name)
        if child is None:
            if vars(module).get(name) is not kind:
                return False
        elif type(child) is not kind or "forward" in child.__dict__ or hooked(child) or getattr(child, "p", 0.0):
            return False
    return all(vars(module).get(name) == value for name, value in settings)


def swiglu_forward(
    original: Callable, *, joined: bool, passed: tuple[tuple[str, Any], ...], settings: tuple[tuple[str, Any], ...]
) -> Callable:
    @functools.wraps(original)
    def separate_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if not _as_tried(self, passed, settings):
            return original(self, hidden_states)
        return self.down_proj(swiglu(self.gate_proj(hidden_states), self.up_proj(hidden_states)))

    @functools.wraps(original)
    def joined_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if not _as_tried(self, passed, settings):
            return original(self, hidden_states)
        gate, up = self.gate_up_proj(hidden_states).chunk(2, -1)
        return self.down_proj(swiglu(gate, up))

    return joined_forward if joined else separate_forward


def _mlp_differs(module: nn.Module, each: Step) -> str | None:
    dim, hidden = 8, 16
    generator = torch.Generator().manual_seed(0)
    outputs = {"gate_up_proj": 2 * hidden} if dict(each.options)["joined"] else {"gate_proj": hidden, "up_proj": hidden}
    weights = {name: torch.randn(out, dim, generator=generator) / dim**0.5 for name, out in outputs.items()}
    weights["down_proj"] = torch.randn(dim, hidden, generator=generator) / hidden**0.5
    x = torch.randn(2, 3, dim, generator=generator)

    def trial(training: bool, dtype: torch.dtype, magnitude: float) -> bool:
        parts = {name: _linear(weight.to(dtype)) for name, weight in weights.items()}
        return _same_result(module, each, stand_in(module, **parts), training, (magnitude * x).to(dtype))

    return why_different(module, trial)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.T.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _arguments(module: nn.Module) -> int:
    """Two are the module and its input. Ours take no more, so an optional gate would be lost."""
    return len(inspect.signature(class_forward(module)).parameters)


def _same_result(module: nn.Module, each: Step, twin: nn.Module, training: bool, x: Tensor) -> bool:
    theirs = class_forward(module)
    nn.Module.train(twin, training)
    ours = each.make(theirs, **dict(each.options))(twin, x.clone())
    return same(ours, theirs(twin, x.clone()))
