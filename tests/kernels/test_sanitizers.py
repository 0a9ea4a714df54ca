"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The module is compiled once more with both, and loaded into a Python of its own with ASan's runtime first.
Tensors are placed at the very end of a malloc'ed block, so that one element too far is an error. AMX, which few
processors have, is emulated, and held against the other instruction sets.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[2]

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"
CHILD = """
import importlib.util, itertools, sys
import numpy as np

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)
cpu = cpu.cpu

def array(*shape, dtype):
    return np.zeros(shape, {0: np.float32, 1: np.uint16, 2: np.uint16}[dtype])  # a block of its own

def rows(a):
    return (a.ctypes.data, 1, a.shape[1], 0)

none = (0, 1, 0, 0)
for name in cpu.instruction_sets():
    cpu.use_instruction_set(name)
    for r, n, dtype, extra in itertools.product((0, 1, 3, 40), (1, 5, 16, 33, 64, 127), (0, 1, 2), (False, True)):
        x, dy, y, h, dx = (array(r, n, dtype=dtype) for _ in range(5))
        w, dw, rstd = array(n, dtype=dtype), array(n, dtype=dtype), array(r, dtype=0)
        second = rows(dy) if extra else none
        cpu.rms_norm_forward(rows(x), second, w.ctypes.data, y.ctypes.data, h.ctypes.data, rstd.ctypes.data,
                             r, n, 1e-6, 0.5, dtype, dtype, 0, 0)
        partials = cpu.rms_norm_partials(r, n, dtype, 0)
        work = array(partials, n, dtype=0)
        cpu.rms_norm_backward(rows(dy), rows(x), rows(h) if extra else none, w.ctypes.data, rstd.ctypes.data,
                              dx.ctypes.data, dw.ctypes.data, work.ctypes.data, partials, r, n, 0.5, dtype, dtype, 0, 0)
        cpu.swiglu_forward(rows(x), rows(dy), y.ctypes.data, r, n, dtype, 0, 0)
        cpu.swiglu_backward(rows(dy), rows(x), rows(y), dx.ctypes.data, h.ctypes.data, r, n, dtype, 0, 0)
        targets = np.arange(r) % (n + 2) - 1  # -1 and n: out of range; 1: ignored
        floats = [array(size, dtype=0) for size in (r, r, r, n, 1)]
        loss, lse, dlse, weights, mean = (a.ctypes.data for a in floats)
        for softcap, given in ((0.0, 0), (5.0, weights)):
            options = (1, 0.1 * bool(given), 1e-3, softcap, 0, n, dtype)
            cpu.cross_entropy_forward(rows(x), targets.ctypes.data, given, mean, loss, lse, r, n, *options, 0, 0)
            cpu.cross_entropy_backward(rows(x), targets.ctypes.data, given, mean, lse, loss, 1, dlse if extra else 0,
                                       dx.ctypes.data, r, n, *options, 0, 0)
        queries = r if extra and r else 0
        for kind, mask in ((0, None), (1, np.zeros((r, n), np.uint8)), (2, array(r, n, dtype=dtype)),
                           (3, array(r, n, dtype=0))):
            levels = (mask.ctypes.data if kind else 0, 1, max(1, r), 0, 0, n, kind)
            cpu.softmax_forward(rows(x), levels, y.ctypes.data, r, n, queries, 0.5, dtype, 0, 0)
        cpu.softmax_backward(rows(dy), rows(y), dx.ctypes.data, r, n, queries, 0.5, dtype, 0, 0)
        cos, sin, positions = array(4, n // 2, dtype=0), array(4, n // 2, dtype=0), np.full(r, 3)
        for given in (0, positions.ctypes.data):
            for out in (y, x):  # x: in place
                cpu.rope(rows(x), rows(out), cos.ctypes.data, sin.ctypes.data, given,
                         r, n, 1, 4, n // 2, 4, extra, extra, dtype, 0, 0)
    x, y = array(2, 20001, dtype=0), array(2, 20001, dtype=0)  # too long to be held
    cpu.softmax_forward(rows(x), (0, 1, 1, 0, 0, 0, 0), y.ctypes.data, 2, 20001, 0, 1.0, 0, 0, 0)

def normal(*shape, dtype):
    x = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    if dtype == 1:
        return x.astype(np.float16).view(np.uint16)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype else x

def heads(a):  # [batch, tokens, heads, dim]; packed without the batch
    return (a.ctypes.data, a.strides[0] // a.itemsize if a.ndim == 4 else 0,
            a.strides[-3] // a.itemsize, a.strides[-2] // a.itemsize)

def wide(a, dtype):
    if dtype == 2:
        return (a.astype(np.uint32) << 16).view(np.float32)
    return a.view(np.float16).astype(np.float32) if dtype == 1 else a

def attention(nq, nk, h, kv, d, dtype, packed, window, softcap):
    lead = () if packed else (2,)
    q, dout = normal(*lead, nq, h, d, dtype=dtype), normal(*lead, nq, h, d, dtype=dtype)
    k, v = normal(*lead, nk, kv, d, dtype=dtype), normal(*lead, nk, kv, d, dtype=dtype)
    out, dq, dk, dv = (np.zeros_like(t) for t in (q, q, k, k))
    lse, delta = (np.zeros((*lead, h, nq), np.float32) for _ in range(2))
    sinks = normal(h, dtype=0)
    cu_q, cu_k = np.array([0, nq // 3, nq]), np.array([0, nk // 2, nk])
    cu = (cu_q.ctypes.data, cu_k.ctypes.data) if packed else (0, 0)
    rest = ((2, nq, nk, h, kv, d), (d**-0.5, True, window, softcap), dtype, 0, 0)
    qkv = heads(q), heads(k), heads(v)
    cpu.attention_forward(*qkv, sinks.ctypes.data, *cu, out.ctypes.data, lse.ctypes.data, *rest)
    cpu.attention_backward(heads(dout), *qkv, *cu, out.ctypes.data, lse.ctypes.data, lse.ctypes.data,
                           delta.ctypes.data, dq.ctypes.data, dk.ctypes.data, dv.ctypes.data, *rest)
    results = [out, dq, dk, dv]
    if not packed:
        few, seen = np.zeros_like(q), np.array([nk, nk // 2])
        cpu.attention_decode(*qkv, sinks.ctypes.data, seen.ctypes.data, few.ctypes.data, lse.ctypes.data, *rest)
        results.append(few)
    return [wide(t, dtype) for t in results]

cases = [(1, 1, 1, 1, 1), (1, 130, 2, 1, 33), (37, 70, 4, 2, 40), (70, 37, 2, 2, 64), (97, 193, 2, 1, 17)]
cases += [(5, 3, 1, 1, 256)]
for case, dtype in itertools.product(cases, (0, 1, 2)):
    for packed, window, softcap in ((False, 0, 0.0), (True, 20, 5.0)):
        found = []
        for name in cpu.instruction_sets():
            cpu.use_instruction_set(name)
            found.append(attention(*case, dtype, packed, window, softcap))
        for other in found[1:]:  # the instruction sets agree
            for a, b in zip(found[0], other):
                assert np.allclose(a, b, rtol=0, atol=(1e-4, 4e-3, 4e-2)[dtype] * max(1, abs(a).max())), (case, dtype)
print("clean", cpu.instruction_sets())
if len(sys.argv) > 2:  # one row too many: the sanitizer must see it
    x = array(1, 64, dtype=0)
    cpu.rms_norm_forward(rows(x), none, 0, x.ctypes.data, 0, x.ctypes.data, 2, 64, 1e-6, 0.0, 0, 0, 0, 0)
"""


@pytest.fixture(scope="module")
def library() -> Path:
    work = ROOT / "build" / "sanitized"  # kept: ninja compiles again what has changed
    flags = f"{SANITIZE} -O1 -g1 -DFASTLLM_EMULATE_AMX"
    environment = os.environ | {"FASTLLM_CUDA_ARCHS": "none", "CXXFLAGS": flags}
    command = ["setup.py", "-q", "build_ext", "--force", f"--build-lib={work}", f"--build-temp={work}"]
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)
    (module,) = (work / "fastllm" / "kernels").glob("_C.*.so")
    return module


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", CHILD, str(library), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG)


pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or platform.system() != "Linux", reason="needs g++ and its sanitizers, on Linux"
)


def test_clean(library):
    found = run(library)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "clean" in found.stdout
    assert ("amx" in found.stdout) == ("avx512_bf16" in found.stdout)


def test_the_sanitizer_sees_a_row_too_many(library):
    found = run(library, "spoil")
    assert found.returncode != 0
    assert "heap-buffer-overflow" in found.stderr
