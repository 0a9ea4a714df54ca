from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastllm.kernels import library, native


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
    options = (-100, 0.0, 0.0, 0.0, 0, 8)

    def call(logits=x, target=index[:2], loss=loss):
        native.KERNELS["cpu"].cross_entropy_forward(
            logits, target, None, None, options, loss, torch.empty(2), *native.place(x)
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
