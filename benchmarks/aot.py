"""Compile every GPU kernel ahead of time and tabulate what the compilers made of it. Needs no GPU.

    python -m benchmarks.aot              compare with the committed table (benchmarks/aot.json)
    python -m benchmarks.aot --changed    without compiling again what the table was made of, but for a sample
    python -m benchmarks.aot --write      write that table

Triton kernels are compiled for each target as their own launchers launch them (:func:`launches` lists the
calls), with the same specialisation; CUDA C++ kernels are read out of the installed native module. Per kernel and
target, out of the machine code (machine_code.py): registers, bytes of local memory (where spills go) and of shared
memory (static and dynamic), tensor-core instructions, the widest load and store, stores, calls, and the blocks of a
multiprocessor.

A kernel that spills, that needs more shared memory than there is, that has lost its tensor-core instructions, loads or
stores fewer bytes at once or makes more calls, fails. All numbers are held against the table only where the compiler
is the very one that the table was made with; it has one for each version of Triton.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from . import machine_code
from .machine_code import Row, read_amd, read_cubin, short_names
from .targets import TARGETS, current_target, specialized_attention

SAMPLE = 16
LOSSES = {"tensor_core": "tensor-core instructions", "tma": "loads by TMA"}
TABLE = Path(__file__).with_name("aot.json")
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024}

Table = dict[str, dict[str, Row]]  # kernel -> target -> row


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of each launch to compile: sizes that reach every branch of the launchers."""
    import torch

    from fastllm.kernels.attention import triton_tuning

    def rms_norm(cols: int, dtype: torch.dtype) -> Callable[[], Any]:
        def call() -> None:
            x, w, rstd = torch.empty(16, cols, dtype=dtype), torch.empty(cols, dtype=dtype), torch.empty(16)
            torch.ops.fastllm.rms_norm_forward(x, w, x, 1e-6, 0.0, True, "triton")
            torch.ops.fastllm.rms_norm_backward(x, x, w, rstd, x, 0.0, True, "triton")

        return call

    def softmax(cols: int, dtype: torch.dtype, mask: torch.Tensor | None, causal: bool) -> Callable[[], Any]:
        def call() -> None:
            x = torch.empty(2, 8, cols, dtype=dtype)
            torch.ops.fastllm.softmax_forward(x, mask, 0.5, causal, "triton")
            torch.ops.fastllm.softmax_backward(x, x, 0.5, causal, "triton")

        return call

    def cross_entropy(classes: int, dtype: torch.dtype, every: bool) -> Callable[[], Any]:
        def call() -> None:
            logits, target, lse = (
                torch.empty(16, classes, dtype=dtype),
                torch.zeros(16, dtype=torch.int64),
                torch.empty(16),
            )
            weights = (torch.empty(classes), torch.empty(())) if every else (None, None)
            options = (-100, 0.1, 1e-3, 30.0, 1.0) if every else (-100, 0.0, 0.0, 0.0, 1.0)
            rest = (*options, 0, classes, "triton")
            torch.ops.fastllm.cross_entropy_forward(logits, target, *weights, *rest)
            tensors = (target, *weights, lse, torch.empty(()).expand(16), lse if every else None, None, None)
            torch.ops.fastllm.cross_entropy_backward(logits, *tensors, *rest)

        return call

    def log_prob(dtype: torch.dtype, scale: float, softcap: float, entropy: bool) -> Callable[[], Any]:
        def call() -> None:
            hidden, weight = torch.empty(16, 64, dtype=dtype), torch.empty(32768, 64, dtype=dtype)
            head, each = (hidden, weight, None, torch.zeros(16, dtype=torch.int64), None, None), torch.empty(16)
            rest = (-100, 0.0, 0.0, softcap, scale, 0, 32768)
            torch.ops.fastllm.linear_cross_entropy_forward(*head, *rest, entropy, "triton")
            upstream = (each, None, *((each, each) if entropy else (None, None)))
            wanted = (True, True, False, False)
            torch.ops.fastllm.linear_cross_entropy_backward(*head, each, *upstream, *wanted, *rest, "triton")

        return call

    def jsd(classes: int, dtype: torch.dtype, beta: float, backward: bool) -> Callable[[], Any]:
        def call() -> None:
            from fastllm.kernels.loss import triton_kernels

            logits, loss = torch.empty(16, classes, dtype=dtype), torch.empty(16)
            above = (torch.empty(()).expand(16), logits) if backward else (None, None)
            divergence = beta, 1 - beta, 1.0
            triton_kernels.jsd(logits, logits, torch.ones(16).bool(), above[0], divergence, "triton", loss, above[1])

        return call

    def attention(dim: int, dtype: torch.dtype, every: bool = False, softcap: float = 0.0) -> Callable[[], Any]:
        from fastllm.kernels.attention.options import UNBOUNDED

        options, packing, sinks, length = (0.1, UNBOUNDED, 0, 0.0), (None, None, 0, 0), None, None
        if every:
            cu = torch.tensor([0, 512])
            options, packing, sinks, length = (0.1, 63, 0, softcap), (cu, cu, 512, 512), torch.empty(4), cu[:1]

        def call() -> None:
            q, k = torch.empty(1, 512, 4, dim, dtype=dtype), torch.empty(1, 512, 1, dim, dtype=dtype)
            ops, lse = torch.ops.fastllm, torch.empty(1, 4, 512)
            ops.attention_decode(q if every else q[:, :1], k, k, length, None, sinks, *options, True, "triton")
            if every:
                q, k, lse = q[0], k[0], lse[0]
            ops.attention_forward(q, k, k, sinks, *packing, *options, True, True, "triton")
            dlse = lse if every else None
            ops.attention_backward(q, dlse, q, k, k, q, lse, *packing, *options, False, "triton")

        return call

    def specialized(dim: int, every: bool = False, softcap: float = 0.0) -> Callable[[], Any]:
        def call() -> None:
            with specialized_attention(softcap > 0):
                attention(dim, torch.bfloat16, every, softcap)()

        return call

    def rope(dtype: torch.dtype, interleaved: bool) -> Callable[[], Any]:
        def call() -> None:
            x, table = torch.empty(2, 16, 32, 128, dtype=dtype), torch.empty(64, 64)
            torch.ops.fastllm.rotate(x, table, table, torch.zeros(2, 16).long(), interleaved, False, "triton")

        return call

    def paged(dim: int, dtype: torch.dtype, every: bool = False) -> Callable[[], Any]:
        from fastllm.kernels.attention.options import UNBOUNDED

        options, sinks = ((0.1, 63, 0, 30.0), torch.empty(4)) if every else ((0.1, UNBOUNDED, 0, 0.0), None)

        def call() -> None:
            q, pool = torch.empty(2, 1, 4, dim, dtype=dtype), torch.empty(64, 16, 1, dim, dtype=dtype)
            lengths, table = torch.tensor([900, 5]), torch.zeros(2, 64, dtype=torch.int32)
            torch.ops.fastllm.attention_decode(q, pool, pool, lengths, table, sinks, *options, True, "triton")

        return call

    def rope_append(dtype: torch.dtype, interleaved: bool) -> Callable[[], Any]:
        def call() -> None:
            x, pool = torch.empty(16, 48, 128, dtype=dtype), torch.empty(4, 16, 8, 128, dtype=dtype)
            table, at = torch.empty(64, 64), torch.zeros(16).long()
            q, k, v = x.split([32, 8, 8], 1)
            torch.ops.fastllm.rotate_append(q, k, v, table, table, at, at, pool, pool, interleaved, "triton")

        return call

    def swiglu(dtype: torch.dtype) -> Callable[[], Any]:
        def call() -> None:
            x = torch.empty(16, 4096, dtype=dtype)
            torch.ops.fastllm.swiglu_forward(x, x, "triton")
            torch.ops.fastllm.swiglu_backward(x, x, x, "triton")

        return call

    def packed_linear(dtype: torch.dtype, depth: int, int8: bool, gated: bool = False) -> Callable[[], Any]:
        def call() -> None:
            x, rows = torch.empty(16, depth, dtype=dtype), 512 if gated else 256
            weight = torch.empty(rows, depth, dtype=torch.int8 if int8 else dtype)
            scales = torch.empty(rows) if int8 else None
            bias = None if gated else torch.empty(256, dtype=dtype)
            torch.ops.fastllm.packed_linear_forward(x, weight, scales, 256, False, gated, bias, False, "triton")

        return call

    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"rope {name}", rope(dtype, False)
        yield f"rope {name} interleaved", rope(dtype, True)
        yield f"rope_append {name}", rope_append(dtype, False)
        yield f"rope_append {name} interleaved", rope_append(dtype, True)
        yield f"swiglu {name}", swiglu(dtype)
        yield f"packed_linear {name}", packed_linear(dtype, 4096, False)
        yield f"packed_linear {name} int8", packed_linear(dtype, 4096, True)
        yield f"packed_linear {name} gated", packed_linear(dtype, 4096, False, True)
    yield "packed_linear bfloat16 4095", packed_linear(torch.bfloat16, 4095, False)
    for dim in (64, 128, 256):
        yield f"attention bfloat16 {dim}", attention(dim, torch.bfloat16)
        yield f"decode in pages bfloat16 {dim}", paged(dim, torch.bfloat16)
    for dim in (64, 128):
        yield f"attention float32 {dim}", attention(dim, torch.float32)
        yield f"decode in pages float32 {dim}", paged(dim, torch.float32)
        yield f"decode in pages bfloat16 {dim} window, sinks, softcap", paged(dim, torch.bfloat16, True)
        yield f"attention bfloat16 {dim} packed, window, sinks", attention(dim, torch.bfloat16, True)
        yield f"attention bfloat16 {dim} packed, window, sinks, softcap", attention(dim, torch.bfloat16, True, 30.0)
    if triton_tuning.specialized("forward", triton_tuning.architecture(torch.device("cuda")), 64, False):
        for dim in (64, 128, 256):
            yield f"attention bfloat16 {dim}", specialized(dim)
        for dim in (64, 128):
            yield f"attention bfloat16 {dim} packed, window, sinks", specialized(dim, True)
            yield f"attention bfloat16 {dim} packed, window, sinks, softcap", specialized(dim, True, 30.0)
    for cols in (128, 4096, 8192, 16384, 65536):
        yield f"rms_norm bfloat16 {cols}", rms_norm(cols, torch.bfloat16)
    for cols in (8192, 16384):
        yield f"rms_norm float32 {cols}", rms_norm(cols, torch.float32)
    for cols in (128, 4096, 16384, 262144):
        yield f"softmax bfloat16 {cols}", softmax(cols, torch.bfloat16, None, False)
    yield "softmax float32 16384", softmax(16384, torch.float32, None, False)
    for cols in (4096, 262144):
        boolean, bias = torch.empty(2, 1, cols, dtype=torch.bool), torch.empty(cols)
        yield f"softmax bfloat16 {cols} causal boolean mask", softmax(cols, torch.bfloat16, boolean, True)
        yield f"softmax bfloat16 {cols} causal additive mask", softmax(cols, torch.bfloat16, bias, True)
    for classes in (128, 4096, 262144):
        yield f"cross_entropy bfloat16 {classes}", cross_entropy(classes, torch.bfloat16, False)
        yield f"cross_entropy bfloat16 {classes} every argument", cross_entropy(classes, torch.bfloat16, True)
    yield "cross_entropy float32 262144 every argument", cross_entropy(262144, torch.float32, True)
    yield "log_prob bfloat16 temperature", log_prob(torch.bfloat16, 0.7, 0.0, False)
    yield "log_prob bfloat16 entropy", log_prob(torch.bfloat16, 1.0, 0.0, True)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"log_prob {str(dtype).removeprefix('torch.')} temperature, softcap, entropy"
        yield name, log_prob(dtype, 0.7, 30.0, True)
    for name, beta in (("forward KL", 0.0), ("JSD", 0.5), ("reverse KL", 1.0)):
        for classes in (128, 262144):
            yield f"linear_jsd bfloat16 {classes} {name}", jsd(classes, torch.bfloat16, beta, True)
        yield f"linear_jsd bfloat16 262144 {name}, loss alone", jsd(262144, torch.bfloat16, beta, False)
    yield "linear_jsd float32 262144 JSD", jsd(262144, torch.float32, 0.5, True)


@dataclass(frozen=True)
class Source:
    """A launch of a Triton kernel for a target, and a hash of all that its machine code, and so its row, depends on."""

    compile: Callable[[], Any]
    digest: str


@functools.cache
def triton_sources() -> dict[tuple[str, str], Source]:
    """(name, target) -> what the launchers launch there, to be compiled as Triton itself would for this launch."""
    import fastllm.kernels  # noqa: F401 (registers the operators)
    from fastllm.kernels.attention import triton_tuning
    from fastllm.kernels.triton_launch import INT32, Kernel, small

    found: dict[tuple[str, str], Source] = {}
    tools = compilers()["triton"], Path(machine_code.__file__).read_text()

    def record(kernel: Kernel, grid: Any, *launch: Any, **options: int) -> None:
        tensors, numbers, *rest = launch
        kinds: list[Any] = [x if x is None else (x.dtype, x.data_ptr() % 16 == 0, small(x)) for x in tensors]
        kinds += [(type(n), n >= INT32) for n in numbers]
        given = (kernel.jit.cache_key, kinds, rest, sorted(options.items()), target, tools)
        digest = hashlib.sha256(repr(given).encode()).hexdigest()[:16]
        found[f"{name} {kernel.name}", target] = Source(functools.partial(kernel.compile, *launch, **options), digest)

    with mock.patch.object(Kernel, "__call__", record):
        for target in TARGETS:
            with mock.patch.object(triton_tuning, "architecture", lambda device, target=target: target):
                for name, call in launches():  # noqa: B007 (record reads the name)
                    call()
    return found


def _compile_triton(name: str, target: str) -> Row:
    """Compile one recorded launch for one target (in a worker process: Triton's compilers hold the GIL)."""
    with current_target(target):
        compiled = triton_sources()[name, target].compile()
    threads = TARGETS[target][2] * compiled.metadata.num_warps
    if target.startswith("gfx"):
        return read_amd(compiled.asm["amdgcn"], threads)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        ((_, row),) = read_cubin(Path(cubin.name), target, threads=threads, shared=compiled.metadata.shared).items()
    return row


def triton_table(known: Mapping[str, Row]) -> Table:
    """``known``: rows by the digest of their source, of which one in SAMPLE is made again all the same."""
    sources = triton_sources()
    jobs = [job for i, job in enumerate(sources) if sources[job].digest not in known or i % SAMPLE == 0]
    # Spawned, not forked: a fork of a process with OpenMP threads hangs.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        rows = dict(zip(jobs, pool.map(_compile_triton, *zip(*jobs, strict=True)), strict=True))
    print(f"triton: {len(jobs)} compiled, {len(sources) - len(jobs)} as they were")
    table: Table = defaultdict(dict)
    for (name, target), source in sources.items():
        table[name][target] = rows.get((name, target)) or known[source.digest]
    return dict(table)


def cuda_table() -> Table | str:
    """The table of the installed module's CUDA kernels, or the reason why there is none."""
    from fastllm.kernels import native

    if native._C is None or not hasattr(native._C, "cuda"):
        return "the installed module has no CUDA C++ (install with nvcc on the PATH)"
    if shutil.which("c++filt") is None:
        return "c++filt is not installed"
    table: Table = defaultdict(dict)
    for arch in native._C.cuda.archs.split():
        rows = read_cubin(Path(native._C.__file__), f"sm_{arch}", one=False)
        plain = subprocess.run(["c++filt", "-p", *rows], capture_output=True, text=True, check=True).stdout.splitlines()
        for name, row in zip(short_names(plain), rows.values(), strict=True):
            table[name][f"sm_{arch}"] = row
    return dict(sorted(table.items()))


def compilers() -> dict[str, str]:
    import triton

    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"release [\d.]+, V([\d.]+)", text)
    except (OSError, subprocess.CalledProcessError):
        found = None
    return {"triton": triton.__version__, "cuda": found.group(1) if found else "none"}


def problems(kind: str, new: Table, old: Table, same_compiler: bool) -> list[str]:
    """What is wrong with ``new``, on its own and against the committed table ``old``."""
    found = []
    for kernel, targets in new.items():
        for target, row in targets.items():
            place = f"{kind}: {kernel} on {target}"
            if row["local"]:
                found.append(f"{place}: {row['local']} bytes of local memory (it spills)")
            if row["shared"] > SHARED.get(target, max(SHARED.values())):
                found.append(f"{place}: {row['shared']} bytes of shared memory, there are {SHARED[target]}")
            before = old.get(kernel, {}).get(target)
            if before is None:
                found.append(f"{place}: not in the table (python -m benchmarks.aot --write)")
            elif lost := [f"{before[k]} {said}" for k, said in LOSSES.items() if before[k] and not row[k]]:
                found.append(f"{place}: lost its {', '.join(lost)}")
            elif row["store"] < before["store"] or row["load"] < before["load"]:
                found.append(f"{place}: loads and stores {row['load']} and {row['store']} bytes at once, the table has "
                             f"{before['load']} and {before['store']}")  # fmt: skip
            elif row["calls"] > before["calls"]:
                found.append(
                    f"{place}: {row['calls']} calls (slow paths of divisions?), the table has {before['calls']}"
                )
            elif same_compiler and row != before:
                found.append(f"{place}: {row}, the table has {before} (python -m benchmarks.aot --write)")
    found += [f"{kind}: {kernel}: in the table, but not compiled" for kernel in old if kernel not in new]
    return found


def report(table: Table) -> str:
    """Markdown: per kernel and target the registers × the blocks of a multiprocessor, the bytes of the widest load and
    store, shared memory, tensor-core instructions, calls and spills."""
    targets = [t for t in TARGETS if any(t in row for row in table.values())]
    lines = ["| kernel | " + " | ".join(targets) + " |", "|---|" + "---|" * len(targets)]
    for kernel, rows in table.items():
        cells = []
        for target in targets:
            row = rows.get(target)
            cells.append(_cell(row) if row else "–")
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    notes = {
        "shared": "{} B shared",
        "tensor_core": "{} mma",
        "tma": "{} TMA",
        "calls": "**{} calls**",
        "local": "**{} B spilled**",
    }
    said = [text.format(row[k]) for k, text in notes.items() if row[k]]
    return ", ".join([f"{row['registers']} ×{row['blocks']}", f"{row['load']}/{row['store']} B", *said])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--changed", action="store_true", help="compile what has changed since the table was made, and "
                        f"one in {SAMPLE} of the others")  # fmt: skip
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    versions = compilers()
    known = json.loads(TABLE.read_text())
    rows = known["triton"].get(versions["triton"], {})
    made_of = {}
    for digest, job in known["sources"].items():
        name, _, target = job.rpartition(" on ")
        if target in rows.get(name, {}):
            made_of[digest] = rows[name][target]
    new = {"triton": triton_table(made_of if arguments.changed else {}), "cuda": cuda_table()}
    if arguments.write:
        for kind, table in new.items():
            if not isinstance(table, str):
                # of Triton one table for each version, of CUDA C++ one
                known[kind] = (known[kind] if kind == "triton" else {}) | {versions[kind]: table}
        known["sources"] = {s.digest: " on ".join(job) for job, s in triton_sources().items()}
        TABLE.write_text(json.dumps(known, indent=1) + "\n")
    found = []
    for kind, table in new.items():
        if isinstance(table, str):
            print(f"CUDA C++: left as it is: {table}")
            continue
        version, of = versions[kind], known[kind]
        old = of.get(version) or of[max(of)]
        print(f"\n{kind} {version}: registers per thread × blocks, bytes of a load/store\n\n{report(table)}\n")
        found += problems(kind, table, old, version in of)
    print("\n" + ("\n".join(found) if found else "no spills, nothing lost against the table"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
