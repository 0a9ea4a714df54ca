"""What looking at a module found, and the tools for looking."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import use_backend
from .swap import Step

MAGNITUDES = (1e-3, 1.0, 1e2, 1e4)  # the least is of eps' size in a norm, the greatest meets a clamp


@dataclass(frozen=True)
class Finding:
    """A module that a kernel could serve: what to change, or why it is left as it is."""

    part: str  # "norm", "mlp", "rotary", "attention" or "loss"
    name: str  # where it is in the model
    kind: str  # its class
    note: str  # the kernel, or why not
    steps: tuple[tuple[nn.Module, Step], ...] = ()  # new forwards
    disagrees: bool = False  # left because it was tried, and computed something else

    @property
    def replaced(self) -> bool:
        return bool(self.steps)


def defining_class(module: nn.Module) -> type[nn.Module]:
    """The class that defines the forward of ``module``: fully_shard and others put subclasses above it."""
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


def class_forward(module: nn.Module) -> Callable:
    """The forward of the module's class: not what was put on the instance."""
    return type(module).forward


SIZES = ("vocab_size", "token_id")  # of names of settings that change no result of ours


def settings_of(module: nn.Module, holders: tuple[Any, ...]) -> tuple[tuple[str, Any], ...]:
    """The numbers that the forward of ``module`` reads in ``holders``: with others it may compute something else."""
    names = sorted(name for name in names_in(class_forward(module)) if not name.endswith(SIZES))
    found = ((name, setting(holders, name)) for name in names)
    return tuple((name, value) for name, value in found if isinstance(value, int | float) and type(value) is not bool)


def setting(holders: tuple[Any, ...], name: str) -> Any:
    return next((vars(holder)[name] for holder in holders if name in vars(holder)), None)


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


# ---- trying a module on small tensors ----


def stand_in(module: nn.Module, **parts: nn.Parameter | nn.Module) -> nn.Module:
    """A copy of ``module`` that shares all but its children and the parameters and children named.

    Small parts on the CPU make trying cheap, wherever the module's own parameters are: on a GPU, sharded, on meta.
    """
    twin = object.__new__(type(module))  # not copy.copy: what FSDP has wrapped makes itself anew
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = {
        name: stand_in(child) if name not in parts and child is not None else child
        for name, child in module._modules.items()
    }
    for name, part in parts.items():
        twin.__dict__["_parameters" if isinstance(part, nn.Parameter) else "_modules"][name] = part
    return twin


def dtypes_to_try(module: nn.Module) -> list[torch.dtype]:
    """float32, where little is lost, and the dtype of the module, on which its code may depend."""
    own = {p.dtype for p in module.parameters()} & {torch.float16, torch.bfloat16, torch.float64}
    return [torch.float32, *own]


@contextmanager
def quietly() -> Iterator[None]:
    """Try modules whatever device, autocast and backend the caller has chosen, and leave its random state as it was."""
    with (
        torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False),
        use_backend("torch"), torch.random.fork_rng(devices=[]),
    ):  # fmt: skip
        yield


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, where both are finite: a check of what is computed, not how well."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    finite = a.isfinite() & b.isfinite()  # beyond the range of the dtype there is nothing to compare
    bound = max(1e-4, 8 * torch.finfo(a.dtype).eps)
    a, b = a[finite].double(), b[finite].double()
    return not a.numel() or bool((a - b).abs().max() <= bound * b.abs().max())


def why_different(module: nn.Module, trial: Callable[[bool, torch.dtype, float], bool]) -> str | None:
    """None if a kernel computes what ``module`` does, else why not. ``trial(training, dtype, magnitude)`` compares."""
    for training in (False, True):
        for dtype in dtypes_to_try(module):
            for magnitude in MAGNITUDES:
                try:
                    agree = trial(training, dtype, magnitude)
                except Exception:  # whatever a foreign forward raises on our stand-in: it is another structure
                    return "it has another structure"
                if not agree:
                    return "it drops out in training" if training else f"at inputs of about {magnitude:g} it differs"
    return None
