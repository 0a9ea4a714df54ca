"""Every CUDA C++ op launches on the device that it is given, and sets back the one that was current before."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable

import pytest
import torch

from fastllm import kernels
from tests.numerics import assert_accurate, with_gradients

OPS: dict[str, Callable[..., torch.Tensor]] = {
    "rms_norm": lambda x: kernels.rms_norm(x, torch.ones(64, requires_grad=True), backend="cuda"),
    "softmax": lambda x: kernels.softmax(x, backend="cuda"),
    "cross_entropy": lambda x: kernels.cross_entropy(x, torch.zeros(4, dtype=torch.int64), backend="cuda"),
    "swiglu": lambda x: kernels.swiglu(x, x, backend="cuda"),
    "rope": lambda x: kernels.rope(*[x.view(1, 4, 1, 64)] * 2, *[torch.ones(4, 32)] * 2, backend="cuda")[0],
}


def place_on(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("activation", "loss", "norm", "rotary"):
        native = importlib.import_module(f"fastllm.kernels.{family}.native")
        monkeypatch.setattr(native, "place", lambda x: (device, 0))


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("op", OPS)
def test_an_op_launches_on_its_device(simt, monkeypatch: pytest.MonkeyPatch, op: str, device: int) -> None:
    library = ctypes.CDLL(simt.__file__)
    library.simt_recorded.restype = ctypes.c_char_p
    place_on(device, monkeypatch)
    x = torch.randn(4, 64, requires_grad=True)
    library.simt_record(True)
    try:
        OPS[op](x).sum().backward()
        calls = library.simt_recorded().decode().split(", ")
    finally:
        library.simt_record(False)
    launches = [call for call in calls if call.startswith("launch")]
    assert len(launches) >= 2  # forward and backward
    assert set(launches) == {f"launch on {device}"}
    sets = [call for call in calls if call not in launches]
    turn = ["cudaSetDevice(1)", "cudaSetDevice(0)"] if device else ["cudaSetDevice(0)"]
    assert sets == len(launches) * turn or (op == "rms_norm" and sets == 2 * turn)  # two kernels at a time
    assert library.simt_device() == 0


@pytest.mark.parametrize("device", [0, 1, 2])
@pytest.mark.parametrize(("cols", "dtype"), [(66008, torch.bfloat16), (262144, torch.float32)])
def test_long_rows(simt, monkeypatch: pytest.MonkeyPatch, cols: int, dtype: torch.dtype, device: int) -> None:
    """On GPUs with clusters of 16 blocks, of 8, and none."""
    place_on(device, monkeypatch)
    check_rows(cols, dtype)


def check_rows(cols: int, dtype: torch.dtype) -> None:
    x, weight, dy = (torch.randn(n).to(dtype) for n in ((3, cols), (cols,), (3, cols)))

    def softmax(x: torch.Tensor, backend: str) -> torch.Tensor:
        return kernels.softmax(x, backend=backend)

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, backend: str) -> torch.Tensor:
        return kernels.rms_norm(x, weight, backend=backend)

    for op, given in ((softmax, [x]), (rms_norm, [x, weight])):
        exact = with_gradients(lambda *t, op=op: op(*t, "torch"), given, [dy], torch.Tensor.double)
        eager, ours = (with_gradients(lambda *t, op=op, b=b: op(*t, b), given, [dy]) for b in ("torch", "cuda"))
        for a, b, c in zip(ours, eager, exact, strict=True):
            assert_accurate(a, b, c, op.__name__, c.abs().amax(-1, keepdim=True))


@pytest.mark.parametrize("device", [0, 1, 2])
def test_entropy_of_one_row(simt, device: int) -> None:
    """Which all multiprocessors share, where there are clusters."""
    logits, target, (loss, lse, entropy) = 3 * torch.randn(1, 40008), torch.tensor([7]), torch.empty(3, 1)
    options = (-100, 0.0, 0.0, 0.0, 1.0, 0, 40008)
    simt.cuda.cross_entropy_forward(logits, target, None, None, options, loss, lse, entropy, device, 0)
    exact = logits.double().log_softmax(-1)
    assert_accurate(loss, -logits.log_softmax(-1)[:, 7], -exact[:, 7], "loss")
    eager = torch.distributions.Categorical(logits=logits).entropy()
    assert_accurate(entropy, eager, -(exact.exp() * exact).sum(-1), "entropy")


def test_a_gpu_of_little_shared_memory(simt, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of compute capability 7.5; RMSNorm's sums of 12,000 columns would take 64 KiB a block."""
    place_on(2, monkeypatch)
    library = ctypes.CDLL(simt.__file__)
    library.simt_set_shared_memory.argtypes, library.simt_set_shared_memory.restype = [ctypes.c_size_t], ctypes.c_bool
    assert library.simt_set_shared_memory(64 << 10)
    try:
        check_rows(12000, torch.bfloat16)
    finally:
        assert library.simt_set_shared_memory(228 << 10)
