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

from torch import nn

_MADE_OF = "_fastllm_made_of"  # of a patched class: the class before, and the steps


@dataclass(frozen=True)
class Step:
    """``make(original forward, **options)`` is the new forward; a function of a module, so that it pickles by name."""

    make: Callable[..., Callable]
    options: tuple[tuple[str, Any], ...] = ()


def step(make: Callable[..., Callable], **options: Any) -> Step:
    return Step(make, tuple(options.items()))


def taken(module: nn.Module) -> str | None:
    """Why the forward of ``module`` can't be replaced, or None."""
    return "its forward was replaced by something else (a hook?)" if "forward" in module.__dict__ else None


def steps_of(module: nn.Module) -> tuple[Step, ...]:
    """The steps of a patched module; none for any other."""
    return getattr(type(module), _MADE_OF, (None, ()))[1]


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
        "forward": forward, _MADE_OF: (kind, steps), "__reduce_ex__": _reduce,
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
    }  # fmt: skip
    return type(kind)(kind.__name__, (kind,), names)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    kind, steps = getattr(type(self), _MADE_OF)
    return (_rebuilt, (kind, steps), *kind.__reduce_ex__(self, protocol)[2:])


def _rebuilt(kind: type[nn.Module], steps: tuple[Step, ...]) -> nn.Module:
    return object.__new__(_patched_class(kind, kind.forward, steps))
