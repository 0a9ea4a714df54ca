"""Fixtures and set-up that all tests share.

Where there is no GPU, Triton kernels run in Triton's interpreter and CUDA C++ kernels in tests/simt/, both
on CPU tensors, through the same public functions that users call.
"""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, at import

from tests import interpreter  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not GPU:
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        if gpu:
            config.hook.pytest_deselected(items=gpu)
            items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers whichever others ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter():
    if GPU:
        yield
    else:
        with interpreter.mended():
            yield


@pytest.fixture(scope="session")
def simt_module():
    """The CUDA C++ kernels compiled for the emulator: a module like fastllm.kernels._C."""
    from tests.simt.module import load

    return load()


@pytest.fixture
def simt(simt_module, monkeypatch: pytest.MonkeyPatch):
    """Inside the test, ``backend="cuda"`` runs CPU tensors in the emulator."""
    from fastllm.kernels import native

    monkeypatch.setattr(native, "cuda_missing", lambda device: None if device.type == "cpu" else "emulated")
    monkeypatch.setitem(native.KERNELS, "cuda", simt_module.cuda)
    return simt_module


@pytest.fixture(params=["cpu", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels, on CPU tensors."""
    if GPU and request.param == "triton":
        pytest.skip("the interpreter is off where there is a GPU; tests marked gpu run the kernel itself")
    if request.param == "cuda":
        request.getfixturevalue("simt")
    return request.param
