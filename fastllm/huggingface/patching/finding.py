"""What looking at a module found, and the tools for looking."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Change:
    """An attribute of a module, as it is to be."""

    module: nn.Module
    attribute: str
    value: Any


@dataclass(frozen=True)
class Finding:
    """A module that a kernel could serve: what to change, or why it is left as it is."""

    part: str  # "norm", "mlp", "rotary", "attention" or "loss"
    name: str  # where it is in the model
    kind: str  # its class
    note: str  # the kernel, or why not
    changes: tuple[Change, ...] = ()  # none: left


def replaced_forward(module: nn.Module, forward: Callable) -> Change:
    """Binding to the instance keeps the class, its parameters' names, its hooks and every other instance."""
    return Change(module, "forward", MethodType(forward, module))


def taken(module: nn.Module) -> str | None:
    """Why the forward of ``module`` can't be replaced, or None."""
    return "its forward was replaced by something else (a hook?)" if "forward" in module.__dict__ else None


def stand_in(module: nn.Module, **parts: nn.Parameter | nn.Module) -> nn.Module:
    """A copy of ``module`` that shares all but the parameters and children named, to try its forward on.

    Small parts on the CPU make trying cheap, wherever the module's own parameters are: on a GPU, sharded, on meta.
    """
    twin = object.__new__(type(module))  # not copy.copy: what FSDP has wrapped makes itself anew
    twin.__dict__.update(module.__dict__)
    for store in ("_parameters", "_modules"):
        twin.__dict__[store] = dict(module.__dict__[store])
    for name, part in parts.items():
        twin.__dict__["_parameters" if isinstance(part, nn.Parameter) else "_modules"][name] = part
    return twin


def class_forward(module: nn.Module) -> Callable:
    """The forward of the module's class: not what was put on the instance."""
    return type(module).forward


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding in float32: a check of what is computed, not how well."""
    return a.shape == b.shape and bool(((a.float() - b.float()).abs() <= 1e-4 * (1 + b.float().abs())).all())


def names_in(function: Callable) -> set[str]:
    """The names that the source of ``function`` mentions: globals, attributes and keywords of calls."""
    return _names(inspect.unwrap(function).__code__)


def _names(code: CodeType) -> set[str]:
    found = {*code.co_names, *code.co_varnames}
    for const in code.co_consts:
        if isinstance(const, tuple):  # keywords
            found.update(word for word in const if isinstance(word, str))
        elif isinstance(const, CodeType):  # a function within
            found |= _names(const)
    return found


def with_globals(function: Callable, **replaced: Any) -> Callable:
    """``function`` as it is, but that it sees other objects under these global names; its decorators are kept."""
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        # Without __name__: torch.compile looks up the globals of a named module there, and would find the old ones.
        names = {k: v for k, v in function.__globals__.items() if k != "__name__"} | replaced
        closure = function.__closure__
    else:
        inner = with_globals(wrapped, **replaced)
        names = function.__globals__
        cells = function.__closure__ or ()
        closure = tuple(CellType(inner) if cell.cell_contents is wrapped else cell for cell in cells)
    twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    twin.__kwdefaults__, twin.__doc__ = function.__kwdefaults__, function.__doc__
    twin.__dict__.update(function.__dict__)
    if wrapped is not None:
        twin.__wrapped__ = inner
    return twin
