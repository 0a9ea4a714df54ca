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
import importlib.util, itertools, sys, types
import numpy as np

# What the binding asks of torch (csrc/tensor_view.h), without PyTorch, which ASan would follow through its libraries.
torch = sys.modules["torch"] = types.ModuleType("torch")
FLOAT32, INT64, INT32 = 0, 3, 4
DTYPES = ["float32", "float16", "bfloat16", "int64", "int32"]
for name in DTYPES:
    setattr(torch, name, name + "!")

class Tensor:
    def __init__(self, array, dtype):
        self.array, self.shape, self.dtype = array, array.shape, getattr(torch, DTYPES[dtype])
    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)
    def numel(self):
        return self.array.size
    def data_ptr(self):
        return self.array.ctypes.data
    def is_contiguous(self):
        return bool(self.array.flags.c_contiguous)

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)
cpu = cpu.cpu

def zeros(*shape, dtype):  # a block of its own
    return Tensor(np.zeros(shape, {0: np.float32, 1: np.uint16, 2: np.uint16}[dtype]), dtype)

def index(values):
    return Tensor(np.array(values, np.int64), INT64)

for name in cpu.instruction_sets():
    cpu.use_instruction_set(name)
    for r, n, dtype, extra in itertools.product((0, 1, 3, 40), (1, 5, 16, 33, 64, 127), (0, 1, 2), (False, True)):
        x, dy, y, h, dx = (zeros(r, n, dtype=dtype) for _ in range(5))
        w, dw, rstd = zeros(n, dtype=dtype), zeros(n, dtype=dtype), zeros(r, dtype=0)
        cpu.rms_norm_forward(x, w, dy if extra else None, 1e-6, 0.5, y, h, rstd, 0, 0)
        work = zeros(cpu.rms_norm_partials(x, 0), n, dtype=0)
        cpu.rms_norm_backward(dy, x, w, rstd, h if extra else None, 0.5, dx, dw, work, 0, 0)
        cpu.swiglu_forward(x, dy, y, 0, 0)
        cpu.swiglu_backward(dy, x, y, dx, h, 0, 0)
        targets = index(np.arange(r) % (n + 2) - 1)  # -1 and n: out of range; 1: ignored
        loss, lse, dlse, weights, mean = (zeros(size, dtype=0) for size in (r, r, r, n, 1))
        entropy = zeros(r, dtype=0) if extra else None
        for softcap, scale, given in ((0.0, 1.0, None), (0.0, 0.5, None), (5.0, 0.5, weights)):
            options = (1, 0.1 * (given is not None), 1e-3, softcap, scale, 0, n)
            cpu.cross_entropy_forward(x, targets, given, mean, options, loss, lse, entropy, 0, 0)
            above = (loss, dlse if extra else None, entropy, entropy)
            cpu.cross_entropy_backward(x, targets, given, mean, lse, *above, options, dx, 0, 0)
        for share, given in ((0.0, None), (0.3, loss), (1.0, loss)):
            counts, out = Tensor(np.arange(r, dtype=np.uint8) % 2, 0), dx if given else None
            cpu.jsd(x, dy, counts if extra else None, given, (share, 1 - share, 0.5), lse, out, 0, 0)
        masks = ((0, None), (1, Tensor(np.zeros((1, 1, max(1, r), n), np.uint8), 0)),
                 (2, zeros(1, 1, max(1, r), n, dtype=dtype)), (3, zeros(1, 1, max(1, r), n, dtype=0)))
        causal = extra and r > 0
        for kind, mask in masks:
            cpu.softmax_forward(x, mask, kind, 0.5, causal, y, 0, 0)
        cpu.softmax_backward(dy, y, 0.5, causal, dx, 0, 0)
        cos, sin = zeros(4, n // 2, dtype=0), zeros(4, n // 2, dtype=0)
        for given in (None, index(np.full(r, 3))):
            for out in (y, x):  # x: in place
                cpu.rope(x, cos, sin, given, extra, extra, out, 4, 1, 0, 0)
    for tokens, n, dtype, extra in itertools.product((0, 1, 40), (1, 5, 16, 33, 64), (0, 1, 2), (False, True)):
        q, out = (zeros(tokens, 3, n, dtype=dtype) for _ in range(2))
        k, v = (zeros(tokens, 2, n, dtype=dtype) for _ in range(2))
        keys, values = (zeros(4, 16, 2, n, dtype=dtype) for _ in range(2))
        cos, slots = zeros(4, n // 2, dtype=0), index(np.arange(tokens) + 64 - tokens)
        cpu.rope_append(q, k, v, cos, cos, index(np.full(tokens, 3)), slots, keys, values, extra, out, 0, 0)
    x, y = zeros(2, 20001, dtype=0), zeros(2, 20001, dtype=0)  # too long to be held
    cpu.softmax_forward(x, None, 0, 1.0, False, y, 0, 0)

def in_panels(array, dtype, halves):  # as pack_weight packs [halves * out_features, in_features]
    n, k = len(array) // halves, array.shape[1]
    pairs, int8 = dtype == 2, array.dtype == np.int8
    depth = -(-k // 32) * 32 if pairs or int8 else k
    part = 32 // halves
    full = np.zeros((halves, -(-n // part) * part, depth), array.dtype)
    full[:, :n, :k] = array.reshape(halves, n, k)
    steps = 2 if pairs and not int8 else 1
    features = full.reshape(halves, -1, part, depth).swapaxes(0, 1)
    panels = features.reshape(-1, 32, depth // steps, steps).transpose(0, 2, 1, 3)
    return Tensor(np.ascontiguousarray(panels), 0 if int8 else dtype)

def normal(*shape, dtype):
    x = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    if dtype == 1:
        return Tensor(x.astype(np.float16).view(np.uint16), dtype)
    return Tensor((x.view(np.uint32) >> 16).astype(np.uint16) if dtype else x, dtype)

def silu(x):
    return x / (1 + np.exp(-x.astype(np.float64)))

def wide(a, dtype):
    if dtype == 2:
        return (a.astype(np.uint32) << 16).view(np.float32)
    return a.view(np.float16).astype(np.float32) if dtype == 1 else a

def attention(nq, nk, h, kv, d, dv, dtype, packed, left, right, softcap):
    lead = () if packed else (2,)
    q, dout = normal(*lead, nq, h, d, dtype=dtype), normal(*lead, nq, h, dv, dtype=dtype)
    k, v = normal(*lead, nk, kv, d, dtype=dtype), normal(*lead, nk, kv, dv, dtype=dtype)
    out, dq, dk, dv, few = (zeros(*t.shape, dtype=dtype) for t in (dout, q, k, v, dout))
    lse, delta = (zeros(*lead, h, nq, dtype=0) for _ in range(2))
    sinks = normal(h, dtype=0)
    cu = (index([0, nq // 3, nq]), index([0, nk // 2, nk])) if packed else (None, None)
    options = (max(d, 1) ** -0.5, left, right, softcap)
    cpu.attention_forward(q, k, v, sinks, *cu, options, out, lse, 0, 0)
    cpu.attention_backward(dout, lse, q, k, v, out, lse, *cu, options, dq, dk, dv, delta, 0, 0)
    results = [out, dq, dk, dv]
    if not packed:
        cpu.attention_decode(q, k, v, index([nk, nk // 2]), None, sinks, options, None, few, lse, 0, 0)
        results.append(few)
        size, columns = 16, nk // 16 + 2
        k, v = (normal(2 * columns, size, kv, n, dtype=dtype) for n in (d, few.shape[-1]))
        paged = zeros(*few.shape, dtype=dtype)
        pages = Tensor(np.arange(2 * columns, dtype=np.int32)[::-1].reshape(2, columns).copy(), INT32)
        cpu.attention_decode(q, k, v, index([nk, size * columns]), pages, sinks, options, None, paged, lse, 0, 0)
        results.append(paged)
    return [wide(t.array, dtype) for t in results]

NONE = 2**31 - 1
cases = [(1, 1, 1, 1, 1, 1), (1, 130, 2, 1, 33, 33), (37, 70, 4, 2, 40, 24), (70, 37, 2, 2, 64, 64)]
cases += [(97, 193, 2, 1, 17, 70), (5, 3, 1, 1, 256, 256)]
none = [(3, 4, 2, 1, 8, 8), (3, 0, 2, 1, 8, 8), (0, 4, 2, 1, 8, 8), (3, 4, 0, 1, 8, 8), (3, 4, 0, 0, 8, 8)]
none += [(3, 4, 2, 1, 0, 8), (3, 4, 2, 1, 8, 0), (3, 4, 2, 1, 0, 0), (0, 0, 0, 0, 0, 0)]
for case, dtype in itertools.product(cases + none, (0, 1, 2)):
    for packed, *options in ((0, NONE, 0, 0.0), (1, 19, 0, 5.0), (0, 7, 3, 0.0), (1, 0, NONE, 0.0)):
        found = []
        for name in cpu.instruction_sets():
            cpu.use_instruction_set(name)
            found.append(attention(*case, dtype, packed, *options))
        for other in found[1:]:  # the instruction sets agree
            for a, b in zip(found[0], other):
                most = max(1, abs(a).max(initial=0))
                assert np.allclose(a, b, rtol=0, atol=(1e-4, 4e-3, 4e-2)[dtype] * most), (case, dtype)
farther = (-(2**63), -1, NONE - 1, NONE, 2**32, 2**62, 2**63 - 1)  # than any key
for packed, left, right in itertools.product((False, True), farther, farther):
    pair = [attention(9, 300, 2, 1, 8, 8, 0, packed, *window, 0.0) for window in ((left, right), (NONE, NONE))]
    for a, b in zip(*pair):
        assert np.array_equal(a, b), (left, right)
for gated, dtype, int8, r, k, n in itertools.product(
    (0, 1), (0, 1, 2), (0, 1), (1, 12, 33, 70), (1, 31, 64, 577), (1, 33, 64)
):
    m = n * (1 + gated)
    x, bias, scales = normal(r, k, dtype=dtype), normal(n, dtype=dtype), normal(m, dtype=0)
    w = np.arange(m * k).reshape(m, k).astype(np.int8) if int8 else normal(m, k, dtype=dtype).array
    scales.array[:] *= 0.01  # int8 products, and those of two in float16, stay finite
    factor = scales.array[:, None] if int8 else 1
    matrix = (w.astype(np.float32) if int8 else wide(w, dtype)) * factor
    right = wide(x.array, dtype) @ matrix.T
    right = silu(right[:, :n]) * right[:, n:] if gated else right + wide(bias.array, dtype)
    for name in cpu.instruction_sets():
        cpu.use_instruction_set(name)
        for given in {dtype, 0}:  # the result in its dtype, and in float32
            out = zeros(r, n, dtype=given)
            panels = in_panels(w, dtype, 1 + gated)
            cpu.linear(x, panels, scales if int8 else None, None if gated else bias, bool(gated), out, 0, 0)
            most = max(1, abs(right).max())
            off = abs(wide(out.array, given) - right).max()
            assert off <= (1e-4, 2e-3, 2e-2)[dtype] * most, (name, gated, dtype, int8, r, k, n, off)
print("clean", cpu.instruction_sets())
if len(sys.argv) > 2:  # one row too many: the sanitizer must see it
    x, y, rstd = zeros(1, 64, dtype=0), zeros(2, 64, dtype=0), zeros(2, dtype=0)
    cpu.rms_norm_forward(x, None, None, 1e-6, 0.0, y, None, rstd, 0, 0)
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
