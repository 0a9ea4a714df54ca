"""Fixtures and set-up that all tests share.

Where there is no GPU, Triton kernels run in Triton's interpreter and CUDA C++ kernels in tests/simt/, both
on CPU tensors, through the same public functions that users call.
"""

from __future__ import annotations

import os

import pytest

# Instruction set of the CPU kernels -> the most that oneDNN, and PyTorch's own kernels, may use beside it.
INSTRUCTION_SETS = {
    "base": ("SSE41", "default"),
    "avx2": ("AVX2", "avx2"),
    "avx512": ("AVX512_CORE", "avx512"),
    "avx512_bf16": ("AVX512_CORE_BF16", "avx512"),
    "amx": ("DEFAULT", "avx512"),
}
if limit := os.environ.get("FASTLLM_CPU_ISA"):
    # PyTorch reads these once, at import; processes that tests start inherit them
    os.environ["ONEDNN_MAX_CPU_ISA"], os.environ["ATEN_CPU_CAPABILITY"] = INSTRUCTION_SETS[limit]

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else it starts a pool of processes, in each of ours

import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, at import

from tests import interpreter  # noqa: E402

# Where there is a GPU the interpreter is off, and tests marked gpu run Triton's kernels themselves.
INTERPRETED = () if GPU else ("triton",)
IN_THE_INTERPRETER = pytest.mark.skipif(
    GPU, reason="the interpreter is off where there is a GPU; tests marked gpu run the kernel itself"
)

# Of the files that take long, the longest first: started last, one would keep one worker busy alone.
LONGEST = (
    "test_repository.py",
    "test_packaging.py",
    "test_attention.py",
    "test_sanitizers.py",
    "test_softmax.py",
    "test_attention_calls.py",
    "test_parallelize.py",
)
MOST_WORKERS = 8  # each takes up to 2 GiB


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """More than single tests run in a process for each core, a file in one of them, which builds what it needs once."""
    option = config.option
    if hasattr(config, "workerinput"):  # a worker, which runs this too
        return
    if getattr(option, "numprocesses", 0) is not None or option.usepdb or any("::" in name for name in config.args):
        return
    option.numprocesses = min(os.cpu_count() or 1, MOST_WORKERS)
    if option.dist == "no":
        option.dist, option.loadscopereorder = "loadfile", False
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait would keep the other workers from the cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not GPU:
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        if gpu:
            config.hook.pytest_deselected(items=gpu)
            items[:] = [item for item in items if item not in gpu]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


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


def ready(request: pytest.FixtureRequest) -> str:
    if GPU and request.param == "triton":
        pytest.skip("the interpreter is off where there is a GPU; tests marked gpu run the kernel itself")
    if request.param == "cuda":
        request.getfixturevalue("simt")
    return request.param


@pytest.fixture(params=["cpu", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels, on CPU tensors."""
    return ready(request)


@pytest.fixture(params=["cpu", "triton", "cuda", "torch"])
def any_backend(request: pytest.FixtureRequest) -> str:
    """The same, and PyTorch."""
    return ready(request)
