from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest
import torch

from fastllm import kernels
from fastllm.kernels import backends, explain, native, rms_norm, swiglu, use_backend
from tests.limits import HANG
from tests.numerics import DTYPES, assert_accurate

X = torch.randn(2, 8)


def test_every_public_op_is_listed():
    assert set(backends.OPS) == {
        *("flash_attention", "flash_decode", "rms_norm", "rope", "rope_append", "swiglu"),
        *("softmax", "cross_entropy", "linear_cross_entropy", "linear_log_prob", "linear_jsd", "packed_linear"),
    }
    assert all(getattr(kernels, name) is op.function for name, op in backends.OPS.items())


def test_explain_tells_what_runs_and_why_not_the_others():
    found = explain(rms_norm, X)
    assert found.chosen == "cpu"
    assert set(found.reasons) == set(kernels.BACKENDS)
    assert "CUDA tensors" in found.reasons["cuda"]
    assert "* cpu" in str(found)
    assert explain("rms_norm", X).reasons == found.reasons


def test_explain_says_which_kernels_there_are_not(monkeypatch):
    monkeypatch.setitem(backends.OPS, "rms_norm", backends.Op("rms_norm", ("cpu",), rms_norm))
    found = explain(rms_norm, X)
    assert found.chosen == "cpu"
    assert found.reasons["cuda"] == "no: rms_norm has no cuda kernel yet"
    with pytest.raises(ValueError, match="rms_norm has no cuda kernel yet"):
        rms_norm(X, backend="cuda")


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


def in_threads(*functions) -> list:
    """What the functions return, each in a thread of its own, all at once; what one raises is raised."""
    results = [None] * len(functions)

    def run(i, function):
        try:
            results[i] = function()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_every_op_explains_itself_and_runs_nothing():
    q, x, w, target = torch.randn(1, 3, 2, 8), torch.randn(3, 8), torch.randn(5, 8), torch.zeros(3, dtype=torch.int64)
    calls = {
        "flash_attention": (q, q, q),
        "flash_decode": (q, q, q),
        "rms_norm": (x,),
        "rope": (q, q, torch.randn(3, 4), torch.randn(3, 4)),
        "rope_append": (*[q[0]] * 3, *[torch.randn(3, 4)] * 2, target, *[torch.zeros(1, 16, 2, 8)] * 2, target),
        "swiglu": (x, x),
        "softmax": (x,),
        "cross_entropy": (x, target),
        "linear_cross_entropy": (x, w, target),
        "linear_log_prob": (x, w, target),
        "linear_jsd": (x, w, x, w),
        "packed_linear": (x, kernels.pack_weight(w)),
    }
    assert set(calls) == set(backends.OPS)
    for name, arguments in calls.items():
        for backend in (None, "torch", "cuda"):
            found = explain(name, *arguments, backend=backend)
            assert isinstance(found, backends.Explanation) and found.op == name
            assert found.chosen == (backend or "cpu")


def test_explain_in_one_thread_leaves_calls_in_others_alone():
    done = threading.Event()

    def explains():
        try:
            return {explain(rms_norm, X).chosen for _ in range(300)}
        finally:
            done.set()

    def calls():
        shapes = set()
        while not done.is_set():
            shapes.add(rms_norm(X).shape)
        return shapes

    explained, *called = in_threads(explains, calls, calls)
    assert explained == {"cpu"}
    assert all(shapes <= {X.shape} for shapes in called)


def test_use_backend_belongs_to_a_thread():
    both = threading.Barrier(2)

    def prefer(name):
        def run():
            before = explain(rms_norm, X).chosen
            with use_backend(name):
                both.wait()
                inside = {explain(rms_norm, X).chosen for _ in range(100)}
                both.wait()
            return before, inside, explain(rms_norm, X).chosen

        return run

    with use_backend("torch"):  # which new threads don't inherit
        assert in_threads(prefer("torch"), prefer(None)) == [("cpu", {"torch"}, "cpu"), ("cpu", {"cpu"}, "cpu")]


def test_use_backend_belongs_to_a_task():
    async def prefer(name):
        with use_backend(name):
            await asyncio.sleep(0)
            chosen = [explain(rms_norm, X).chosen]
            await asyncio.sleep(0)
            return [*chosen, explain(rms_norm, X).chosen]

    async def none():
        await asyncio.sleep(0)
        return explain(rms_norm, X).chosen

    async def both():
        return await asyncio.gather(prefer("torch"), prefer(None), none())

    assert asyncio.run(both()) == [["torch", "torch"], ["cpu", "cpu"], "cpu"]
    with use_backend("torch"):
        assert asyncio.run(both()) == [["torch", "torch"], ["cpu", "cpu"], "torch"]  # tasks inherit


def test_backward_keeps_the_backend_of_its_forward():
    x = torch.randn(2, 8, requires_grad=True)
    with use_backend("cpu"):
        y = swiglu(x, x)
    with use_backend("torch"):
        assert type(y.grad_fn).__name__.startswith("_SwiGLU")
        (inside,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (elsewhere,) = in_threads(lambda: torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(inside, elsewhere)


def test_use_backend_under_compile():
    """One graph each, made again where the preference differs: around the call, inside it, and in another thread."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append("fastllm" in graph.code)
        return graph

    def inside(x):
        with use_backend("torch"):
            y = rms_norm(x)
        return y, rms_norm(x)

    compiled = torch.compile(rms_norm, fullgraph=True, backend=count)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), rms_norm(X))
        with use_backend("torch"):
            torch.testing.assert_close(compiled(X), rms_norm(X, backend="torch"))
            in_threads(lambda: compiled(X))
    assert graphs == [True, False]
    got = torch.compile(inside, fullgraph=True, backend=count)(X)
    assert torch.equal(got[0], rms_norm(X, backend="torch")) and torch.equal(got[1], rms_norm(X))
    assert explain(rms_norm, X).chosen == "cpu"


def test_a_compiled_call_is_compiled_once():
    """In a process that has found no kernel yet: what it finds is nothing that torch.compile guards on."""
    code = """
import torch
from fastllm.kernels import cross_entropy, flash_attention, rms_norm, softmax
torch._dynamo.config.error_on_recompile = True
x, q = torch.randn(4, 8, requires_grad=True), torch.randn(1, 4, 2, 8)
for f, given in (
    (lambda x: softmax(rms_norm(x)), x),
    (lambda q: flash_attention(q, q, q), q),
    (lambda x: cross_entropy(x, torch.zeros(4, dtype=torch.long)), x),
):
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    for _ in range(3):
        compiled(given)
    f(given)
    compiled(given)
print("once")
"""
    done = run(code)
    assert done.stdout == "once\n" and "Warning" not in done.stderr, done.stderr


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
    backends._found_kernels.cache_clear()
    try:
        assert explain(rms_norm, X).chosen == "torch"
        assert rms_norm(X).shape == X.shape
    finally:
        backends._found_kernels.cache_clear()


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
    """A contiguous tensor, or a view [outer, inner, cols] of the same rows, without a copy where two strides do."""
    x = view(torch.arange(4 * 5 * 6 * 8.0).view(4, 5, 6, 8))
    rows = native.as_rows(x)
    assert rows.is_contiguous() or rows.dim() == 3
    assert (rows.data_ptr() != x.data_ptr()) == copied
    assert torch.equal(rows.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))


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
    assert found == ["this build or processor does not run the instruction set 'mmx'", "base False"]


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        ("80 90a 100 120", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)], [(7, 5)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("80", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
    ],
)
def test_the_gpus_that_compiled_kernels_run_on(archs, runs, does_not):
    assert [c for c in runs if not native.runs_on(c, archs)] == []
    assert [c for c in does_not if native.runs_on(c, archs)] == []
