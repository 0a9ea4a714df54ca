from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastllm import kernels
from fastllm.kernels import backends, explain, flash_attention, native, rms_norm, use_backend
from tests.limits import HANG
from tests.numerics import DTYPES, assert_accurate

X = torch.randn(2, 8)


def test_every_public_op_is_listed():
    assert set(backends.OPS) == {
        *("flash_attention", "flash_decode", "rms_norm", "rope", "swiglu"),
        *("softmax", "cross_entropy", "linear_cross_entropy", "linear_log_prob"),
    }
    assert all(getattr(kernels, name) is op.function for name, op in backends.OPS.items())


def test_explain_tells_what_runs_and_why_not_the_others():
    found = explain(rms_norm, X)
    assert found.chosen == "cpu"
    assert set(found.reasons) == set(kernels.BACKENDS)
    assert "CUDA tensors" in found.reasons["cuda"]
    assert "* cpu" in str(found)
    assert explain("rms_norm", X).reasons == found.reasons


def test_explain_says_which_kernels_there_are_not():
    q = torch.randn(1, 4, 2, 8)
    found = explain(flash_attention, q, q, q)
    assert found.chosen == "cpu"
    assert found.reasons["cuda"] == "no: flash_attention has no cuda kernel yet"


def test_explain_checks_the_call_and_does_not_run_it():
    with pytest.raises(ValueError, match="weight must have shape"):
        explain(rms_norm, X, torch.ones(3))
    with pytest.raises(ValueError, match="unknown op 'conv2d'"):
        explain("conv2d", X)
    assert rms_norm(X).shape == X.shape  # and leaves nothing behind


def test_explain_says_what_a_forced_backend_would_do():
    found = explain(rms_norm, X, backend="cuda")
    assert found.chosen == "cuda"
    assert "would raise" in found.reasons["cuda"]


def test_a_forced_backend_that_cannot_run_raises():
    with pytest.raises(ValueError, match="backend 'cuda' can't run this call: serves CUDA tensors, these are on cpu"):
        rms_norm(X, backend="cuda")
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="flash_attention has no cuda kernel yet"):
        flash_attention(q, q, q, backend="cuda")


def test_float64_runs_on_the_torch_backend():
    assert explain(rms_norm, X.double()).chosen == "torch"
    with pytest.raises(ValueError, match="not float64"):
        rms_norm(X.double(), backend="cpu")


def test_use_backend_is_a_preference_for_a_block():
    with use_backend("torch"):
        assert explain(rms_norm, X).chosen == "torch"
        with use_backend(None):
            assert explain(rms_norm, X).chosen == "cpu"
        assert explain(rms_norm, X, backend="cpu").chosen == "cpu"
    assert explain(rms_norm, X).chosen == "cpu"
    with use_backend("cuda"):  # can't serve CPU tensors: the automatic choice stands
        assert explain(rms_norm, X).chosen == "cpu"
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass


def test_use_backend_survives_an_exception():
    with pytest.raises(RuntimeError), use_backend("torch"):
        raise RuntimeError
    assert explain(rms_norm, X).chosen == "cpu"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLLM_BACKEND")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=HANG)


def test_environment_variable():
    code = "import torch; from fastllm.kernels import explain; print(explain('rms_norm', torch.ones(2, 2)).chosen)"
    assert run(code, FASTLLM_BACKEND="torch").stdout.strip() == "torch"
    wrong = run(code, FASTLLM_BACKEND="gpu")
    assert wrong.returncode != 0
    assert "environment variable FASTLLM_BACKEND: unknown backend 'gpu'" in wrong.stderr


def test_kernels_need_torch_and_triton_alone():
    """A user of the kernels installs nothing else, and triton is optional even then."""
    code = """
import sys
for name in ("numpy", "triton", "rich", "tyro", "tokenizers", "safetensors", "matplotlib", "pybind11"):
    sys.modules[name] = None
import torch, fastllm.kernels as k
print(round(k.rms_norm(torch.ones(2, 4)).sum().item()), k.explain("rms_norm", torch.ones(2, 4)).reasons["triton"])
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("8 no: triton is not installed")


def test_without_the_native_module_pytorch_serves(monkeypatch):
    monkeypatch.setattr(native, "KERNELS", {})
    monkeypatch.setattr(native, "_MISSING", "no module", raising=False)
    assert explain(rms_norm, X).chosen == "torch"
    assert rms_norm(X).shape == X.shape


@pytest.mark.parametrize(
    ("view", "copied"),
    [
        (lambda x: x, False),
        (lambda x: x[:, :, 1], False),
        (lambda x: x[:, 1:3], False),
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x[..., ::2], True),
        (lambda x: x[:1, :1, :1], False),
        (lambda x: x[..., :1], False),
        (lambda x: x[:, :, :1].expand(4, 5, 7, 8), False),
    ],
)
def test_rows_are_addressed_in_place(view, copied):
    """Following inner and the two strides reaches each row, without a copy wherever two strides are enough."""
    x = view(torch.arange(4 * 5 * 6 * 8.0).view(4, 5, 6, 8))
    y, (data, inner, outer, step) = native.as_rows(x)
    assert data == y.data_ptr()
    assert (y.data_ptr() != x.data_ptr()) == copied
    rows = x.reshape(-1, x.shape[-1])
    flat = torch.as_strided(y, (y.untyped_storage().size() // 4 - y.storage_offset(),), (1,))
    for r in range(len(rows)):
        at = (r // inner) * outer + (r % inner) * step
        assert torch.equal(flat[at : at + x.shape[-1]], rows[r])


@pytest.mark.skipif("cpu" not in native.KERNELS, reason="no native module")
def test_each_instruction_set_is_right():
    cpu = native.KERNELS["cpu"]
    best = cpu.instruction_set()
    assert best == os.environ.get("FASTLLM_CPU_ISA", cpu.instruction_sets()[-1])
    x, w = torch.randn(5, 101), torch.randn(101)
    special = torch.tensor([0.0, -0.0, 1e-8, 6e-8, 65519.0, 65520.0, 1e30, float("inf"), -2e-38, 1 + 2**-9] * 3)
    try:
        for name in cpu.instruction_sets():
            cpu.use_instruction_set(name)
            assert cpu.instruction_set() == name
            for dtype in DTYPES:
                a, b = x.to(dtype), w.to(dtype)
                exact, eager = rms_norm(a.double(), b.double()), rms_norm(a, b, backend="torch")
                assert_accurate(rms_norm(a, b, backend="cpu"), eager, exact, name)
                # x + 0 shows each conversion on its own
                h = rms_norm(special.to(dtype), residual=torch.zeros(30, dtype=dtype), backend="cpu")[1]
                assert torch.equal(h + 0.0, special.to(dtype) + 0.0)
    finally:
        cpu.use_instruction_set(best)
    with pytest.raises(ValueError, match="does not run the instruction set 'mmx'"):
        cpu.use_instruction_set("mmx")


@pytest.mark.skipif("cpu" not in native.KERNELS, reason="no native module")
def test_the_environment_limits_instruction_sets():
    """Ours, and what oneDNN may use for products of bfloat16."""
    code = """
import os, torch
from fastllm.kernels import native
os.environ["FASTLLM_CPU_ISA"] = "mmx"
try:
    native.KERNELS["cpu"].instruction_set()
except ValueError as error:
    print(error)
os.environ["FASTLLM_CPU_ISA"] = "base"
print(native.KERNELS["cpu"].instruction_set(), native.multiplies_bfloat16())
"""
    found = run(code, ONEDNN_MAX_CPU_ISA="AVX512_CORE").stdout.splitlines()
    assert found == ["this processor does not run the instruction set 'mmx'", "base False"]
