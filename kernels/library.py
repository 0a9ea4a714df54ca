"""Operators of ``torch.library``, declared once, so that torch.compile and export see through the kernels.

``Library.define``/``impl`` and not the ``custom_op`` decorator: a call costs 2 µs instead of 62.
"""

from __future__ import annotations

import functools
import importlib
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fastllm", "DEF")

Size = int | torch.SymInt  # a number that dynamic shapes may leave open, in a declaration

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Size: "SymInt",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    type(None): "()",
}


def operator(
    declaration: Callable[..., Any] | None = None,
    *,
    strided: str = "",
    launch: Callable[..., None] | None = None,
    mutates: str = "",
) -> Callable[..., Any]:
    """Declare ``torch.ops.fastllm.<name>``; the decorated function becomes a call of it.

    The declaration's signature is the operator's schema, and its body allocates and returns the outputs: all that
    there is to do with fake tensors. A real call then passes the arguments and the outputs to ``launch``, by
    default the function of the same name in :func:`launchers` of the declaration's folder. Where all outputs are
    empty nothing is launched. The last argument is ``backend: str``. ``mutates`` names an argument that is written;
    such an operator returns nothing.

    ``strided`` names the tensors that ``launch`` reads in place, whatever their strides. Every other one reaches it
    contiguous: here, and nowhere else, small tensors get the memory order that kernels read.

    An argument that is a NamedTuple stands in the schema as its fields. The declaration, ``launch`` and callers of
    the decorated function have it whole.

    Differentiation is the business of the op's ``torch.autograd.Function``.
    """
    if declaration is None:
        return functools.partial(operator, strided=strided, launch=launch, mutates=mutates)
    name, folder = declaration.__name__, declaration.__module__.rpartition(".")[0]
    types = typing.get_type_hints(declaration)
    returned = types.pop("return")
    tuples = [(i, t) for i, t in enumerate(types.values()) if hasattr(t, "_fields")]
    results = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    outputs = ", ".join(_TYPES[t] for t in results)
    in_place = {*strided.split(), mutates}
    fields = _flat(types)
    if unknown := in_place - {*fields, ""}:
        raise TypeError(f"{name} has no argument {', '.join(sorted(unknown))}")
    dense = [i for i, (x, t) in enumerate(fields.items()) if t in (Tensor, Tensor | None) and x not in in_place]
    schema = ", ".join(f"{'Tensor(a!)' if x == mutates else _TYPES[t]} {x}" for x, t in fields.items())
    _library.define(
        f"{name}({schema}) -> {outputs if len(results) == 1 else f'({outputs})'}",
        tags=torch.Tag.pt2_compliant_tag,
    )

    def whole(flat: tuple[Any, ...]) -> tuple[Any, ...]:
        for i, t in tuples:
            end = i + len(t._fields)
            flat = (*flat[:i], t(*flat[i:end]), *flat[end:])
        return flat

    def fake(*flat: Any) -> Any:
        return declaration(*whole(flat))

    def call(*flat: Any) -> Any:
        for i in dense:
            if flat[i] is not None and not flat[i].is_contiguous():
                flat = (*flat[:i], flat[i].contiguous(), *flat[i + 1 :])
        arguments = whole(flat) if tuples else flat
        result = declaration(*arguments)
        outputs = (result,) if isinstance(result, Tensor) else result or ()
        for output in outputs:
            if output.numel():
                break
        else:
            if outputs:
                return result
        kernel = launch or getattr(launchers(folder, arguments[-1]), name)
        kernel(*arguments, *outputs)
        return result

    _library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastllm::{name}", fake, lib=_library)
    overload = getattr(torch.ops.fastllm, name).default
    if not tuples:
        return overload

    @functools.wraps(declaration)
    def flattened(*arguments: Any) -> Any:
        flat: list[Any] = []
        for argument in arguments:
            flat.extend(argument) if isinstance(argument, tuple) else flat.append(argument)
        return overload(*flat)

    return flattened


def _flat(types: dict[str, Any]) -> dict[str, Any]:
    """The annotations of arguments, with the fields of a NamedTuple in its place."""
    flat: dict[str, Any] = {}
    for name, t in types.items():
        flat |= typing.get_type_hints(t) if hasattr(t, "_fields") else {name: t}
    return flat


@functools.cache
def launchers(folder: str, backend: str) -> ModuleType:
    """The module of a family's folder that launches the kernels of ``backend``.

    Its functions take an operator's arguments and then its outputs. Triton is imported here only: the other
    backends do without.
    """
    return importlib.import_module(".triton_kernels" if backend == "triton" else ".native", folder)


def in_torch_func() -> bool:
    """Whether a transform of ``torch.func`` is on, as torch.autograd.Function asks it."""
    return torch._C._are_functorch_transforms_active()


in_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as backends.transformed


def has_values() -> bool:
    """Whether tensors can be asked for their values and addresses: neither while traced nor in a transform."""
    return not (torch.compiler.is_compiling() or in_torch_func())


def function(differentiable: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The call of an autograd Function that has ``forward``, ``setup_context`` and ``backward``.

    ``torch.func`` wants the first two apart, and PyTorch then binds the arguments with ``inspect`` at every call, which
    takes 35 µs. Outside its transforms a Function with both in one takes the call.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = differentiable.forward(*inputs)
        differentiable.setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiable.backward)}
    direct = type(differentiable.__name__, (torch.autograd.Function,), methods)

    @functools.wraps(differentiable.forward)
    def call(*inputs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return differentiable.apply(*_distinct(inputs))
        return (differentiable if in_torch_func() else direct).apply(*inputs)

    return call


def _distinct(inputs: tuple[Any, ...]) -> list[Any]:
    """Inputs as Dynamo traces a Function of them: no tensor twice, and in torch.func none that is an argument of what
    is differentiated, whose gradient would be lost. A view is another tensor."""
    distinct: list[Any] = []
    for x in inputs:
        again = isinstance(x, Tensor) and (in_torch_func() or any(x is seen for seen in distinct))
        distinct.append(x.view_as(x) if again else x)
    return distinct


class _Once(torch.autograd.Function):
    """Hands gradients through, and says so when somebody differentiates them again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, like: Tensor, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        math = " inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)" if ctx.name == "flash_attention" else ""
        raise NotImplementedError(
            f"{ctx.name}: its kernels have no second derivative; call it with backend='torch'{math}, "
            "which PyTorch can differentiate twice"
        )


_once = function(_Once)


def differentiable_once(name: str, like: Tensor, grad: Tensor | None) -> Tensor | None:
    """``grad``, computed by a kernel from ``like`` (a tensor of the graph), so that its own gradient raises."""
    if grad is None or not torch.is_grad_enabled():
        return grad
    return _once(name, like, grad)
