"""Replacing the forward of one module: the module gets a subclass of its own class, as FSDP2 and parametrize do.

A subclass, and not a function bound to the instance, because all that copies a module copies its class: ``deepcopy``,
``pickle``, ``torch.save`` and the replicas of ``nn.DataParallel`` each call the new forward on their own parameters.
The subclass has the name of the class, so that code that finds layers by name (FSDP and device-map policies, the
``architectures`` of a checkpoint) finds them, and pickle refers to it by that class and the steps that made it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

_MADE_OF = "_fastllm_made_of"  # of a patched class: the class before, and the steps
_FORWARD = "_fastllm_forward"  # and its forward, which a subclass of it may have replaced
_SHARDING = ("torch.distributed.fsdp.", "deepspeed.")  # their hooks gather and free parameters, and change no result


@dataclass(frozen=True)
class Step:
    """``make(original forward, **options)`` is the new forward; a function of a module, so that it pickles by name."""

    make: Callable[..., Callable]
    options: tuple[tuple[str, Any], ...] = ()
    methods: tuple[tuple[str, Callable], ...] = ()  # that the module gets beside it


def step(make: Callable[..., Callable], **options: Any) -> Step:
    return Step(make, tuple(options.items()))


def taken(module: nn.Module) -> str | None:
    """Why the forward of ``module`` can't be replaced, or None."""
    if is_parametrized(module):
        return "it is parametrized (torch.nn.utils.parametrize)"
    return "its forward was replaced by something else (a hook?)" if "forward" in module.__dict__ else None


def steps_of(module: nn.Module) -> tuple[Step, ...]:
    """The steps of a patched module; none for any other."""
    return getattr(type(module), _MADE_OF, (None, ()))[1]


def patched_class(module: nn.Module) -> type[nn.Module]:
    """The class that :func:`swap` made, above which others may stand by now."""
    return next(kind for kind in type(module).__mro__ if _MADE_OF in vars(kind))


def swap(module: nn.Module, steps: tuple[Step, ...]) -> None:
    module.__class__ = _patched_class(type(module), type(module).forward, steps)


def swap_back(module: nn.Module) -> None:
    module.__class__ = getattr(type(module), _MADE_OF)[0]


def why_not_back(module: nn.Module) -> str | None:
    """What was done to a patched module since, that :func:`swap_back` would undo or break."""
    if _MADE_OF not in vars(type(module)):
        return f"the class of a {getattr(type(module), _MADE_OF)[0].__name__} was replaced after patch()"
    if "forward" in module.__dict__:
        return f"the forward of a {type(module).__name__} was replaced after patch()"
    return None


@functools.cache
def _patched_class(kind: type[nn.Module], forward: Callable, steps: tuple[Step, ...]) -> type[nn.Module]:
    for each in steps:
        forward = each.make(forward, **dict(each.options))
    names = {
        "forward": forward, _FORWARD: staticmethod(forward), _MADE_OF: (kind, steps), "__reduce_ex__": _reduce,
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
    }  # fmt: skip
    names |= {name: method for each in steps for name, method in each.methods}
    return type(kind)(kind.__name__, (kind,), names)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    kind, steps = getattr(type(self), _MADE_OF)
    return (_rebuilt, (kind, steps), *kind.__reduce_ex__(self, protocol)[2:])


def _rebuilt(kind: type[nn.Module], steps: tuple[Step, ...]) -> nn.Module:
    return object.__new__(_patched_class(kind, kind.forward, steps))


# ---- what was done to a module since ----


def runs(module: nn.Module, make: Callable[..., Callable]) -> bool:
    """Whether calling ``module`` runs the forward that ``make`` made: no adapter, subclass or wrapper since."""
    kind = type(module)
    made = any(each.make is make for each in steps_of(module))
    return made and "forward" not in module.__dict__ and kind.forward is getattr(kind, _FORWARD)


def hooked(module: nn.Module) -> bool:
    """Whether somebody else sees, and may change, what ``module`` gets and gives."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    if _has_any_global_hook():
        return True
    return any(not _sharding(hook) for each in hooks for hook in each.values())


def _sharding(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_SHARDING)


def plain(tensor: Tensor | None) -> bool:
    """No subclass that computes in its own way, as a quantized weight is. Shards are gathered by the hooks of FSDP."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    return tensor is None or type(tensor) in (Tensor, nn.Parameter)
