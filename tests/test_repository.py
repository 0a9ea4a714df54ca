"""The repository itself: lint, format, what is installed, and what the compilers make of the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, timeout: float | None = HANG, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_lint(command):
    found = run(sys.executable, "-m", "ruff", *command, ".")
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_package_is_installed():
    """A new folder of kernels must be named in pyproject.toml, or an installed fastllm lacks it."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"fastllm", "fastllm.benchmarks", "fastllm.kernels"}
    found |= {f"fastllm.kernels.{p.parent.name}" for p in (ROOT / "kernels").glob("*/__init__.py")}
    found |= {".".join(p.relative_to(ROOT).parent.parts) for p in (ROOT / "fastllm").rglob("*/__init__.py")}
    assert set(listed) == found


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_native_module_was_built():
    from fastllm.kernels import native

    assert native.cpu_missing() is None


def test_sources_include_no_torch_header():
    """One module serves every torch because it knows none."""
    for path in (ROOT / "csrc").rglob("*.*"):
        assert "torch/" not in path.read_text(), path
        assert "ATen" not in path.read_text(), path


def test_kernels_do_not_import_the_rest():
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        assert "import fastllm" not in text.replace(">>> from fastllm.kernels import", ""), path
        assert "from fastllm" not in text.replace(">>> from fastllm.kernels import", ""), path


def test_transformers_finds_no_kernels_package_here():
    """In this folder transformers looks for Hugging Face's `kernels` and finds ours, which must do no harm."""
    code = """
import transformers.utils, fastllm.kernels, kernels
assert not transformers.utils.is_kernels_available()
assert kernels is not fastllm.kernels and not kernels.__all__
"""
    found = run(sys.executable, "-c", code)
    assert found.returncode == 0, found.stderr


def test_compiled_kernels_match_the_table():
    """Every GPU kernel compiles for every target; nothing spills or loses its tensor-core instructions."""
    # minutes of work where the compiler is not the table's: no limit holds on every machine
    found = run(sys.executable, "-m", "benchmarks.aot", "--changed", timeout=None)
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]


def test_the_gpu_command_says_that_there_is_no_gpu(tmp_path):
    found = run(sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert found.returncode == 2
    assert "there is no GPU here" in found.stderr
    assert not (tmp_path / "out").exists()
