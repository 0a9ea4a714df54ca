"""`fastllm info`, on machines that have or lack this and that."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from fastllm import cli, info
from fastllm.kernels import backends, native
from tests.limits import HANG


def words() -> str:
    """The report, without its line breaks."""
    return " ".join(info.info().split())


def child(code: str, **environment: str) -> str:
    """What the report is in a process of its own, after ``code``."""
    program = f"import sys; {code}; from fastllm.cli import main; sys.exit(main(['info']))"
    env = os.environ | environment
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def test_it_fits_a_screen(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100 or any("/" in line for line in lines if len(line) > 100)
    labels = [line.split()[0] for line in lines if not line.startswith(" ")]
    wanted = ["fastllm", "python", "processor", "torch", "GPU", "backends", "packages", "environment", "missing"]
    assert labels == wanted


def test_what_is_here(monkeypatch):
    monkeypatch.setenv("FASTLLM_DEBUG", "1")
    found = words()
    kernels = native.KERNELS["cpu"]
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads" in found
    assert f"cpu yes, with {kernels.instruction_set()} instructions" in found
    assert "FASTLLM_DEBUG=1" in found


def test_the_command(monkeypatch, capsys):
    """It takes no arguments, and none of the packages of the extra "train"."""
    find = importlib.util.find_spec
    gone = ("tyro", "rich", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    assert cli.main(["info"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert (
        'rich, tyro (for fastllm train, generate, chat, export, plan and bench): pip install "fastllm-kernels[' in found
    )
    assert 'transformers (for fastllm.patch): pip install "fastllm-kernels[hf]"' in found
    assert cli.main(["info", "--help"]) == 0
    assert "usage: fastllm info" in capsys.readouterr().out
    assert cli.main(["info", "now"]) == 2
    assert "info takes no arguments, not 'now'" in capsys.readouterr().err


def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_gpus(monkeypatch):
    fake_gpus(monkeypatch)
    monkeypatch.setitem(native.KERNELS, "cuda", SimpleNamespace(archs="80 90a"))
    found = words()
    for number in range(2):
        assert f"{number}: NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB; CUDA 12.8" in found
    assert "triton yes" in found
    assert "cuda yes, compiled for 80 90a" in found
    monkeypatch.setitem(native.KERNELS, "cuda", SimpleNamespace(archs="100"))
    assert "cuda no: its kernels are compiled for 100, this GPU has compute capability 9.0" in words()
    monkeypatch.delitem(native.KERNELS, "cuda")
    assert "cuda no: this install has no CUDA C++ kernels" in words()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn("the driver is too old", stacklevel=1)))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = words()
    assert "GPU none: this PyTorch (CUDA 12.8) finds none; the driver is too old" in found
    assert "cuda no: there is no GPU" in found
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "GPU none: this PyTorch is a build for CPUs" in words()


def test_no_native_module(monkeypatch):
    monkeypatch.setattr(native, "KERNELS", {})
    monkeypatch.setattr(native, "_MISSING", "the native module was not built; install g++")
    found = words()
    assert "cpu no: the native module is missing, see below" in found
    assert "missing the native module was not built; install g++" in found


def test_no_triton(monkeypatch):
    monkeypatch.setattr(backends, "TRITON_MISSING", "triton is not installed (pip install triton)")
    found = words()
    assert "triton no: see below" in found
    assert "missing triton is not installed (pip install triton)" in found


def test_no_torch():
    assert "torch can't be imported: ModuleNotFoundError" in (found := child("sys.modules['torch'] = None"))
    assert "missing torch: pip install torch" in found


def test_settings_that_are_wrong():
    assert (
        "kernels can't be imported: ValueError: environment variable FASTLLM_BACKEND: unknown backend 'fast'"
        in child("pass", FASTLLM_BACKEND="fast")
    )
    assert "cpu no: this build or processor does not run the instruction set 'mmx'" in child(
        "pass", FASTLLM_CPU_ISA="mmx"
    )


def test_the_other_project(monkeypatch):
    """Its files and ours would lie in one folder."""
    version = info._version
    monkeypatch.setattr(info, "_version", lambda name: "0.2.1" if name == "fastllm" else version(name))
    assert "another distribution, fastllm 0.2.1, writes to the same one; pip uninstall fastllm" in words()
