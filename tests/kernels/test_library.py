from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm.kernels import library, native, rms_norm, swiglu
from fastllm.kernels.norm.op import rms_norm_forward


class Options(NamedTuple):
    scale: float
    size: library.Size


launched = []


def launch(x: Tensor, options: Options, y: Tensor | None, backend: str, out: Tensor) -> None:
    launched.append((options, backend))
    out.copy_(x[: options.size] * options.scale)


@library.operator(launch=launch)
def test_only_scaled(x: Tensor, options: Options, y: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(options.size)


def launch_inplace(x: Tensor, options: Options, backend: str) -> None:
    x.mul_(options.scale)


@library.operator(launch=launch_inplace, mutates="x")
def test_only_scaled_(x: Tensor, options: Options, backend: str) -> None:
    """Scales x itself."""


scaled, scaled_ = test_only_scaled, test_only_scaled_
del test_only_scaled, test_only_scaled_  # pytest would take them for tests


def test_an_operator_is_declared_once():
    """Schema, outputs, fake and launch come from one function; a NamedTuple is flat in the schema alone."""
    ops, x, options = torch.ops.fastllm, torch.randn(4), Options(2.0, 3)
    assert str(ops.test_only_scaled.default._schema) == (
        "fastllm::test_only_scaled(Tensor x, float scale, SymInt size, Tensor? y, str backend) -> Tensor"
    )
    assert "(Tensor(a!) x, float scale, SymInt size, str backend) -> ()" in str(ops.test_only_scaled_.default._schema)
    launched.clear()
    assert torch.equal(scaled(x, options, None, "cpu"), x[:3] * 2)
    assert launched == [(options, "cpu")] and type(launched[0][0]) is Options
    assert scaled(x, Options(2.0, 0), None, "cpu").shape == (0,)
    assert len(launched) == 1  # nothing to write, nothing launched
    scaled_(y := x.clone(), options, "cpu")
    assert torch.equal(y, x * 2)


def test_a_declared_operator_passes_opcheck_and_compiles():
    x, options = torch.randn(4), Options(2.0, 3)
    torch.library.opcheck(torch.ops.fastllm.test_only_scaled, (x, *options, None, "cpu"))
    torch.library.opcheck(torch.ops.fastllm.test_only_scaled_, (x.clone(), *options, "cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: scaled(x, options, None, "cpu") + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x[:3] * 2 + 1)


def test_launchers_are_found_by_family_and_backend():
    for family in ("norm", "activation", "rotary", "attention", "loss"):
        folder = f"fastllm.kernels.{family}"
        assert library.launchers(folder, "cpu") is library.launchers(folder, "cuda")
        assert library.launchers(folder, "cpu").__name__ == f"{folder}.native"
        assert library.launchers(folder, "triton").__name__ == f"{folder}.triton_kernels"


@pytest.mark.skipif("cpu" not in native.KERNELS, reason="no native module")
def test_the_binding_refuses_what_it_would_misread():
    """Launchers prepare their arguments; one that forgets must not make a kernel read elsewhere."""
    x, index, loss = torch.randn(2, 8), torch.zeros(4, dtype=torch.int64), torch.empty(2)
    options = (-100, 0.0, 0.0, 0.0, 1.0, 0, 8)

    def call(logits=x, target=index[:2], loss=loss):
        native.KERNELS["cpu"].cross_entropy_forward(
            logits, target, None, None, options, loss, torch.empty(2), None, *native.place(x)
        )

    call()
    for wrong, error, message in [
        ({"target": index[::2]}, ValueError, "not contiguous"),
        ({"target": index[:2].int()}, TypeError, "wants a tensor of torch.int64"),
        ({"loss": loss.double()}, TypeError, "wants a tensor of torch.float32"),
        ({"logits": x.double()}, TypeError, "torch.float64"),
        ({"logits": torch.randn(2, 16)[:, ::2]}, ValueError, "rows that it can't address"),
        ({"target": "none"}, AttributeError, "is_contiguous"),
    ]:
        with pytest.raises(error, match=message):
            call(**wrong)


def test_who_wants_to_see_operators_sees_them():
    """A plain call goes straight to its kernel; one under a dispatch mode, a profiler or a tracer is an operator's."""
    x, options = torch.randn(4), Options(2.0, 3)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Seen():
        assert torch.equal(scaled(x, options, None, "cpu"), x[:3] * 2)
    assert "fastllm::test_only_scaled" in names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled(x, options, None, "cpu")
    assert "fastllm::test_only_scaled" in {event.key for event in profile.key_averages()}
    traced = torch.jit.trace(lambda x: scaled(x, options, None, "cpu"), x)
    assert torch.equal(traced(x + 1), (x + 1)[:3] * 2)  # a constant would be that of x
    with FakeTensorMode() as mode:
        assert scaled(mode.from_tensor(x), options, None, "cpu").shape == (3,)


def test_a_write_is_seen_by_autograd():
    """Under no_grad too, where no autograd Function says so."""
    x = torch.randn(4, requires_grad=True).clone()
    y = x.square().sum()
    with torch.no_grad():
        scaled_(x, Options(2.0, 4), "cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_is_not_there_is_none_or_for_the_dispatcher_empty():
    x = torch.randn(2, 4)
    assert rms_norm_forward(x, None, None, 1e-6, 0.0, False, "cpu")[1:] == (None, None)
    y, h, rstd = torch.ops.fastllm.rms_norm_forward(x, None, None, 1e-6, 0.0, False, "cpu")
    assert h.shape == rstd.shape == (0,)
    assert torch.equal(y, rms_norm_forward(x, None, None, 1e-6, 0.0, True, "cpu")[0])


def test_a_tensor_left_over_from_a_transform():
    """It has no memory of its own."""
    kept: list[Tensor] = []
    torch.func.grad(lambda x: kept.append(x * 2) or x.sum())(torch.ones(3, 4))
    torch.testing.assert_close(rms_norm(kept[0]), torch.ones(3, 4))
    leaf = kept[0].detach().requires_grad_()
    rms_norm(leaf, torch.ones(4)).sum().backward()
    assert leaf.grad.shape == (3, 4)
    leaf = torch.ones(3, 4, requires_grad=True)
    torch.func.grad(lambda x: kept.append(x) or x.sum())(leaf)
    rms_norm(kept[1]).sum().backward()
    assert leaf.grad.shape == (3, 4)


def test_a_subclass_that_dispatches_computes_in_its_own_way():
    """It may have no memory, and wait for what fills it; here both parts are normalised."""
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    both = rms_norm(TwoTensor(x, y))
    assert isinstance(both, TwoTensor)
    assert torch.equal(both.a, rms_norm(x)) and torch.equal(both.b, rms_norm(y))
    fake = FakeTensorMode().from_tensor(x)  # the mode is not on
    assert rms_norm(fake).shape == (3, 4)


def test_tensors_whose_memory_is_not_what_they_hold():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(swiglu(torch._neg_view(x), y), swiglu(-x, y))
    imaginary = torch.randn(3, 1, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg() and torch.equal(swiglu(imaginary, imaginary), swiglu(*[imaginary.clone()] * 2))
    assert not swiglu(torch._efficientzerotensor(3, 4), y).any()


def test_gradients_in_a_batch():
    """torch.autograd.grad has a vmap of its own."""
    x, dy = torch.randn(3, 4, requires_grad=True), torch.randn(2, 3, 4)
    y = rms_norm(x)
    (batch,) = torch.autograd.grad(y, x, dy, retain_graph=True, is_grads_batched=True)
    for dx, each in zip(batch, dy, strict=True):
        assert torch.equal(dx, torch.autograd.grad(y, x, each, retain_graph=True)[0])
