"""What the CPU kernels need beside their outputs: memory that may run out, and the stack of a small thread."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.limits import HANG

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and stacks are set as on Linux")

COMMON = """
import itertools, sys, threading
import torch
from fastllm.kernels import native, pack_weight

cpu = native.KERNELS["cpu"]
UNBOUNDED = 2**31 - 1
DTYPES = torch.float32, torch.float16, torch.bfloat16

def kernels(dtype, seq, cols, dim=64):
    # Calls that launch every kernel, with outputs that are there already.
    x, y, z, dx = (torch.zeros(4, cols, dtype=dtype) for _ in range(4))
    weight, dweight, rows = torch.zeros(cols, dtype=dtype), torch.zeros(cols, dtype=dtype), torch.zeros(4)
    work = torch.zeros(cpu.rms_norm_partials(x, 0), cols)
    mask, targets, loss = torch.zeros(1, 1, 4, cols), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    options = -100, 0.1, 1e-3, 5.0, 0.5, 0, cols
    cos, heads = torch.zeros(4, cols // 2), (4, cols)
    yield "rms_norm", lambda: cpu.rms_norm_forward(x, weight, y, 1e-6, 1.0, z, dx, rows, 0, 0)
    yield "rms_norm backward", lambda: cpu.rms_norm_backward(y, x, weight, rows, z, 1.0, dx, dweight, work, 0, 0)
    yield "softmax", lambda: cpu.softmax_forward(x, mask, 3, 0.5, False, y, 0, 0)
    yield "softmax backward", lambda: cpu.softmax_backward(z, y, 0.5, False, dx, 0, 0)
    yield "cross_entropy", lambda: cpu.cross_entropy_forward(x, targets, None, None, options, loss, rows, rows, 0, 0)
    yield "cross_entropy backward", lambda: cpu.cross_entropy_backward(
        x, targets, None, None, rows, loss, rows, loss, rows, options, dx, 0, 0)
    yield "jsd", lambda: cpu.jsd(x, y, None, loss, (0.3, 0.7, 1.0), rows, dx, 0, 0)
    yield "swiglu", lambda: cpu.swiglu_forward(x, y, z, 0, 0)
    yield "swiglu backward", lambda: cpu.swiglu_backward(z, x, y, dx, z, 0, 0)
    yield "rope", lambda: cpu.rope(x, cos, cos, None, True, False, y, 4, 1, 0, 0)
    q, k, v, out, dq, dk, dv = (torch.zeros(2, seq, 4, dim, dtype=dtype) for _ in range(7))
    lse, delta = torch.zeros(2, 4, seq), torch.zeros(2, 4, seq)
    few, few_lse = torch.zeros(2, 60, 4, dim, dtype=dtype), torch.zeros(2, 4, 60)
    wide, narrow = torch.zeros(50, 32 * dim, dtype=dtype), torch.zeros(50, 40, dtype=dtype)
    packed = pack_weight(torch.zeros(40, 32 * dim, dtype=dtype), quantize="int8")
    yield "linear", lambda: cpu.linear(wide, packed.data, packed.scales, None, False, narrow, 0, 0)
    band = 0.1, 100, 0, 5.0
    yield "attention", lambda: cpu.attention_forward(q, k, v, None, None, None, band, out, lse, 0, 0)
    yield "attention backward", lambda: cpu.attention_backward(
        q, None, q, k, v, out, lse, None, None, band, dq, dk, dv, delta, 0, 0)
    yield "decode", lambda: cpu.attention_decode(few, k, v, None, None, None, band, None, few, few_lse, 0, 0)
"""

STACKS = """
def everything(failed):
    try:
        for dtype, (seq, cols, dim) in itertools.product(DTYPES, ((300, 70, 64), (200, 17000, 256))):
            for _, call in kernels(dtype, seq, cols, dim):
                call()
        failed.clear()
    except BaseException as error:
        failed[:] = [error]

torch.set_num_threads(int(sys.argv[1]))
threading.stack_size(128 << 10)  # Python and PyTorch take most of that
for isa in cpu.instruction_sets():
    cpu.use_instruction_set(isa)
    failed = ["nothing ran"]
    thread = threading.Thread(target=everything, args=(failed,))
    thread.start()
    thread.join()
    assert not failed, (isa, failed)
print("fine")
"""

MEMORY = """
import resource
torch.set_num_threads(1)

def limited(call, bytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + bytes, before[1]))
    try:
        call()
        return None
    except MemoryError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

found = {}
for dtype in DTYPES:
    # Rows so long, and so many keys, that each workspace is larger than what malloc may still have.
    for name, call in itertools.chain(kernels(dtype, 20000, 64), kernels(dtype, 8, 12_000_000)):
        for bytes in (0, 1 << 20, 24 << 20, 72 << 20):
            said = limited(call, bytes)
            if said is not None:
                assert "could not allocate a workspace of" in said, said
                assert int(said.split(" of ")[1].split()[0]) > 1 << 14, said
                found.setdefault(name, set()).add(dtype)
        call()
for name in ("rms_norm", "rms_norm backward", "attention", "attention backward", "decode", "linear"):
    assert found.get(name) == set(DTYPES), (name, found)
print("fine")
"""


THREADS = """
import os

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(5)
x, w = torch.randn(512, 512), torch.randn(512)
out, rows = torch.empty_like(x), torch.empty(512)
before = threads()
cpu.rms_norm_forward(x, w, None, 1e-6, 0.0, out, None, rows, 0, 0)
assert threads() >= before + 4, threads()
first = out.clone()
native.release_threads()
assert threads() <= before, threads()
cpu.rms_norm_forward(x, w, None, 1e-6, 0.0, out, None, rows, 0, 0)
assert torch.equal(out, first)
print("fine")
"""


def run(script: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-c", COMMON + script, *arguments]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, (found.returncode, found.stderr[-3000:])
    assert found.stdout == "fine\n"


@pytest.mark.parametrize("threads", [1, 3])
def test_small_stacks(threads):
    """One thread: the kernel runs on Python's. Three: on OpenMP's too, whose stacks hold nothing else."""
    run(STACKS, str(threads), OMP_STACKSIZE="32k")


def test_out_of_memory_is_an_exception():
    """Whatever a kernel allocates may fail; it says how much it wanted, and the next call works."""
    run(MEMORY, MALLOC_MMAP_THRESHOLD_="65536")  # what is freed goes back: a kernel finds nothing of its predecessor


def test_threads_are_released():
    run(THREADS)
