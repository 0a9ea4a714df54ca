"""How Triton kernels are launched: when Triton is asked, and what reaches the compiled kernel."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastllm.kernels import triton_launch
from fastllm.kernels.triton_launch import Kernel, rows_at


class Asked:
    """In place of what ``triton.jit`` makes of a function: notes what it is asked, and what it compiled is given."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.options: list[dict[str, Any]] = []
        self.launched: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        self.asked.append(arguments)
        self.options.append(options)
        return SimpleNamespace(function="f", packed_metadata="m", run=lambda *given: self.launched.append(given))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    active = SimpleNamespace(get_current_stream=lambda device: "stream")
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton_launch, "TRITON_INTERPRET", False)
    made = Kernel.__new__(Kernel)
    made.jit, made.compiled = Asked(), {}
    return made


X = torch.zeros(64)
GRID = (7, 2, 1)


def test_the_second_call_goes_straight_to_the_compiled_kernel(kernel):
    for numbers in ((5, 0.5), (6, 1.5)):
        kernel(GRID, (X, None), numbers, (True, 128), 8, num_stages=2)
    assert kernel.jit.asked == [(X, None, 5, 0.5, True, 128)]
    assert kernel.jit.options == [{"num_warps": 8, "enable_fp_fusion": True, "num_stages": 2}]
    assert kernel.jit.launched == [(*GRID, "stream", "f", "m", None, None, None, X, None, 6, 1.5, True, 128)]


@pytest.mark.parametrize(
    "other",
    [
        {"tensors": (X.bfloat16(), None)},
        {"tensors": (X[1:], None)},  # begins at no multiple of 16 bytes
        {"tensors": (X, X)},
        {"constants": (False, 128)},
        {"warps": 4},
        {"num_stages": 3},
    ],
    ids=str,
)
def test_what_is_compiled_anew(kernel, other):
    call = {"tensors": (X, None), "numbers": (5, 0.5), "constants": (True, 128), "warps": 8, "num_stages": 2}
    for _ in range(2):
        kernel(GRID, **call)
        kernel(GRID, **(call | other))
    assert len(kernel.jit.asked) == 2 and len(kernel.jit.launched) == 2


def test_a_tensor_of_2_gib_is_compiled_for_anew_on_amd(kernel, monkeypatch):
    """Triton counts its bytes in 64 bits there, those of smaller ones in 32."""
    large = SimpleNamespace(
        dtype=X.dtype,
        data_ptr=X.data_ptr,
        get_device=X.get_device,
        untyped_storage=lambda: SimpleNamespace(size=lambda: 2**31),
    )
    for hip in (False, True):
        monkeypatch.setattr(triton_launch, "HIP", hip)
        kernel.jit, kernel.compiled = Asked(), {}
        for tensor in (X, large):
            kernel(GRID, (tensor,), (5,), ())
        assert len(kernel.jit.asked) == 1 + hip


def test_numbers_of_64_bits_are_left_to_triton(kernel):
    """It compiles by itself for a number that needs 64 bits; a kernel for 32 would take the lower half."""
    for _ in range(2):
        kernel(GRID, (X,), (5, 2**31), (1,))
        kernel(GRID, (X,), (5, float("nan"), 2**40), (1,))
    assert len(kernel.jit.asked) == 4 and not kernel.compiled and not kernel.jit.launched
    kernel(GRID, (X,), (5, 2**31 - 1), (1,))
    kernel(GRID, (X,), (5, float("nan")), (1,))
    assert len(kernel.jit.asked) == 5 and len(kernel.jit.launched) == 1


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_hear_of_launches(kernel, name, monkeypatch):
    kernel(GRID, (X,), (5,), (1,))
    for hook in (SimpleNamespace(calls=[print]), print):
        with monkeypatch.context() as patch:
            patch.setattr(triton_launch.knobs.runtime, name, hook)
            kernel(GRID, (X,), (5,), (1,))
    assert len(kernel.jit.asked) == 3
    kernel(GRID, (X,), (5,), (1,))
    assert len(kernel.jit.launched) == 1


def test_kernels_declare_tensors_then_numbers_then_constants():
    from fastllm.kernels.activation import triton_kernels as activation
    from fastllm.kernels.attention import triton_backward, triton_decode, triton_forward
    from fastllm.kernels.loss import triton_kernels as loss
    from fastllm.kernels.norm import triton_kernels as norm
    from fastllm.kernels.rotary import triton_kernels as rotary

    modules = (activation, triton_backward, triton_decode, triton_forward, loss, norm, rotary)
    kernels = {k for module in modules for k in vars(module).values() if isinstance(k, Kernel)}
    assert len(kernels) >= 15
    for kernel in kernels:
        parameters = inspect.signature(kernel.jit.fn).parameters.values()
        kinds = [2 if "constexpr" in str(p.annotation) else 1 if p.name.islower() else 0 for p in parameters]
        assert kinds == sorted(kinds) and set(kinds) == {0, 1, 2}, kernel.name
        assert all(p.name.isupper() for p, kind in zip(parameters, kinds, strict=True) if kind != 1), kernel.name


def test_where_rows_are():
    x = torch.zeros(4, 6, 16)
    assert rows_at(x, None) == ((1, 16, 0, 1, 0, 0), True, False)
    assert rows_at(x[:, 1:3]) == ((2, 96, 16), True, True)
    assert rows_at(x[:, 1:3], sizes=(16, 4)) == ((2, 96, 16), False, True)
    assert rows_at(x.view(24, 16)[:, :5].as_strided((24, 1, 5), (16, 16, 1))) == ((1, 16, 16), True, False)
    assert rows_at(torch.zeros(3, 10))[1:] == (False, False)
