"""A copy of a function that finds other globals under some names.

A modeling file of transformers calls its rotary function, its masks and the attention registry as globals, from more
than a hundred different forwards. Writing each of them again would be a hundred places to go wrong. Replacing the
global, as others do, changes every model of the process, and even a global that asks who is calling breaks the pickling
of them all, since modules hold the function they were made with. So a patched module runs a copy of its class's forward
with some names exchanged: same instructions, same globals (the file's own dictionary, not a snapshot), and in it our
functions under names of our own. ``torch.compile`` traces the copy as any function; there is no state, so threads and
gradient checkpointing need no care.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any


def exchanged(original: Callable, tag: str, ours: dict[str, Callable[[Any], Any]]) -> Callable:
    """A copy of ``original`` that finds ``ours[name](theirs)`` where it looks for the global ``name``.

    ``tag`` tells two replacements of one name apart. Of a decorated function it is the decorators around the copy.
    """
    inner, closure, code = getattr(original, "__wrapped__", None), original.__closure__, original.__code__
    if inner is None:
        names = original.__globals__
        new = {name: f"_fastllm_{tag}_{name}" for name in ours if name in names}
        for name, mine in new.items():
            if mine not in names:
                names[mine] = ours[name](names[name])
        code = _renamed(code, new)
    else:
        copied = exchanged(inner, tag, ours)
        closure = tuple(CellType(copied) if cell.cell_contents is inner else cell for cell in closure or ())
    forward = FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    forward.__kwdefaults__ = original.__kwdefaults__
    functools.update_wrapper(forward, original)
    if inner is None:
        del forward.__wrapped__  # it is no wrapper
    else:
        forward.__wrapped__ = copied
    return forward


def _renamed(code: CodeType, new: dict[str, str]) -> CodeType:
    consts = tuple(_renamed(const, new) if isinstance(const, CodeType) else const for const in code.co_consts)
    return code.replace(co_names=tuple(new.get(name, name) for name in code.co_names), co_consts=consts)
