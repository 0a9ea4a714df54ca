"""Every CUDA C++ op launches on the device that it is given, and sets back the one that was current before."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable

import pytest
import torch

from fastllm import kernels

OPS: dict[str, Callable[..., torch.Tensor]] = {
    "rms_norm": lambda x: kernels.rms_norm(x, torch.ones(64, requires_grad=True), backend="cuda"),
    "softmax": lambda x: kernels.softmax(x, backend="cuda"),
    "cross_entropy": lambda x: kernels.cross_entropy(x, torch.zeros(4, dtype=torch.int64), backend="cuda"),
    "swiglu": lambda x: kernels.swiglu(x, x, backend="cuda"),
    "rope": lambda x: kernels.rope(*[x.view(1, 4, 1, 64)] * 2, *[torch.ones(4, 32)] * 2, backend="cuda")[0],
}


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("op", OPS)
def test_an_op_launches_on_its_device(simt, monkeypatch: pytest.MonkeyPatch, op: str, device: int) -> None:
    library = ctypes.CDLL(simt.__file__)
    library.simt_recorded.restype = ctypes.c_char_p
    for family in ("activation", "loss", "norm", "rotary"):
        native = importlib.import_module(f"fastllm.kernels.{family}.native")
        monkeypatch.setattr(native, "place", lambda x: (device, 0))
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
