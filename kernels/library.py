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
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.utils import unwrap_dead_wrappers

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
    empty nothing is launched. The last argument is ``backend: str``. ``mutates`` names the tensors that are
    written; such an operator returns nothing, or something new beside.

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
    several = typing.get_origin(returned) is tuple
    results = typing.get_args(returned) if several else (returned,)
    outputs = ", ".join(_TYPES[t].rstrip("?") for t in results)
    written = mutates.split()
    in_place = {*strided.split(), *written}
    fields = _flat(types)
    if unknown := in_place - {*fields}:
        raise TypeError(f"{name} has no argument {', '.join(sorted(unknown))}")
    kernels: dict[str, Callable[..., None]] = {}  # by backend
    mutated = [list(types).index(x) for x in written]
    # where the tensors are: name -> (argument, its field or None); and those that must be contiguous
    places = {
        x: (i, j if hasattr(t, "_fields") else None)
        for i, (argument, t) in enumerate(types.items())
        for j, (x, of) in enumerate(_flat({argument: t}).items())
        if of in (Tensor, Tensor | None)
    }
    tensors, dense = list(places.values()), [place for x, place in places.items() if x not in in_place]
    alias = {x: f"Tensor({chr(ord('a') + i)}!)" for i, x in enumerate(written)}
    schema = ", ".join(f"{alias.get(x, _TYPES[t])} {x}" for x, t in fields.items())
    _library.define(
        f"{name}({schema}) -> {outputs if len(results) == 1 else f'({outputs})'}",
        tags=torch.Tag.pt2_compliant_tag,
    )

    def whole(flat: tuple[Any, ...]) -> tuple[Any, ...]:
        for i, t in tuples:
            end = i + len(t._fields)
            flat = (*flat[:i], t(*flat[i:end]), *flat[end:])
        return flat

    def flattened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not tuples:
            return arguments
        flat: list[Any] = []
        for argument in arguments:
            flat.extend(argument) if isinstance(argument, tuple) else flat.append(argument)
        return tuple(flat)

    def launched(arguments: tuple[Any, ...]) -> Any:
        for i, j in dense:
            x = arguments[i] if j is None else arguments[i][j]
            if x is not None and not x.is_contiguous():
                x = x.contiguous()
                argument = x if j is None else arguments[i]._replace(**{arguments[i]._fields[j]: x})
                arguments = (*arguments[:i], argument, *arguments[i + 1 :])
        result = declaration(*arguments)
        outputs = result if several else () if result is None else (result,)
        for output in outputs:
            if output is not None and output.numel():
                break
        else:
            if outputs:
                return result
        try:
            kernel = kernels[arguments[-1]]
        except KeyError:
            kernel = kernels[arguments[-1]] = launch or getattr(launchers(folder, arguments[-1]), name)
        kernel(*arguments, *outputs)
        return result

    def fake(*flat: Any) -> Any:
        return _all_there(declaration(*whole(flat)))

    def dispatched(*flat: Any) -> Any:
        return _all_there(launched(whole(flat)))

    _library.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastllm::{name}", fake, lib=_library)
    overload = getattr(torch.ops.fastllm, name).default

    @functools.wraps(declaration)
    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            for i in mutated:
                torch.autograd.graph.increment_version(arguments[i])
            if not _watched():
                for i, j in tensors:
                    x = arguments[i] if j is None else arguments[i][j]
                    if x is not None and _dispatch_keys(x).raw_repr() & _ODD_KEYS:
                        break
                else:
                    return launched(arguments)
        return overload(*flattened(arguments))

    return call


# Of tensors whose memory is not what they hold, or is not there: subclasses with a __torch_dispatch__, negations that
# are yet to be done, zeros without memory, and what a transform wrapped. The dispatcher sees to each of them.
_dispatch_keys = torch._C._dispatch_keys
_ODD = ("Python", "Negative", "ZeroTensor", "Functionalize", "Batched", "FuncTorchBatched", "FuncTorchGradWrapper")
_ODD_KEYS = sum(torch._C.DispatchKeySet(torch._C._parse_dispatch_key(key)).raw_repr() for key in _ODD)  # a bit each


def empty_like(x: Tensor) -> Tensor:
    """Contiguous; a third of the time of ``x.new_empty(x.shape)``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _all_there(result: Any) -> Any:
    """What an operator returns has no None: an empty tensor in its place."""
    if not isinstance(result, tuple):
        return result
    return tuple(result[0].new_empty(0) if output is None else output for output in result)


def _watched() -> bool:
    """Whether somebody wants to see the operators that are called: a transform, a dispatch mode, a tracer, a profiler.

    Otherwise a call goes to its kernel straight away, and not through PyTorch's dispatcher, which takes 5 µs.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


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
    takes 35 µs. Outside its transforms a Function with both in one takes the call. Where no gradient is wanted there is
    no Function: ``forward`` takes it.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = differentiable.forward(*inputs)
        differentiable.setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiable.backward)}
    direct = type(differentiable.__name__, (torch.autograd.Function,), methods)
    apply = super(torch.autograd.Function, direct).apply  # what Function.apply comes to where torch.func is not on

    @functools.wraps(differentiable.forward)
    def call(*inputs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return differentiable.apply(*_distinct(inputs))
        if in_torch_func():
            return differentiable.apply(*inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not differentiated(*tensors):
            return differentiable.forward(*inputs)
        for x in tensors:
            if is_functorch_wrapped_tensor(x):  # left over from a transform; a leaf behind it gets its gradient
                return apply(*unwrap_dead_wrappers(inputs))
        return apply(*inputs)

    return call


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of the tensors is wanted."""
    if in_torch_func():
        return True
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


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
