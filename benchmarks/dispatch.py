"""What a call costs on the host: Python calls and microseconds of ops on one row.

    python -m benchmarks.dispatch            print the table
    python -m benchmarks.dispatch --write    and write it to benchmarks/results/<device>/dispatch.md

A GPU waits for the host wherever a kernel is shorter than its dispatch. Our ops are called as on this machine's CPU,
kernel included, and with Triton as on a GPU, up to the launch, which is left out: what remains is the same with a GPU.
PyTorch's own forms run on the CPU, kernel included. On one thread.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

ROUNDS, CALLS = 31, 200

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One op: our call on a backend, and PyTorch's."""

    name: str
    ours: Callable[[str | None], object]  # takes the backend; None chooses
    pytorch: Call | None


def cases() -> list[Case]:
    import torch
    import torch.nn.functional as F

    from fastllm import kernels

    x, weight = torch.randn(1, 64), torch.randn(64)
    q = torch.randn(1, 1, 2, 64)
    heads_first = q.transpose(1, 2)
    target, table = torch.tensor([3]), torch.randn(4, 32)
    with_grad = x.clone().requires_grad_(), weight.clone().requires_grad_()
    q_with_grad = q.clone().requires_grad_()
    pool, pages = torch.zeros(2, 16, 2, 64), torch.zeros(1, 2, dtype=torch.int32)
    sdpa = F.scaled_dot_product_attention
    return [
        Case(
            "rms_norm",
            lambda b: kernels.rms_norm(x, weight, backend=b),
            lambda: F.rms_norm(x, (64,), weight),
        ),
        Case(
            "rms_norm, for a backward",
            lambda b: kernels.rms_norm(*with_grad, backend=b),
            lambda: F.rms_norm(with_grad[0], (64,), with_grad[1]),
        ),
        Case(
            "flash_attention",
            lambda b: kernels.flash_attention(q, q, q, backend=b),
            lambda: sdpa(heads_first, heads_first, heads_first, is_causal=True),
        ),
        Case(
            "flash_attention, for a backward",
            lambda b: kernels.flash_attention(q_with_grad, q, q, backend=b),
            lambda: sdpa(q_with_grad.transpose(1, 2), heads_first, heads_first, is_causal=True),
        ),
        Case("flash_decode", lambda b: kernels.flash_decode(q, q, q, backend=b), None),
        Case("softmax", lambda b: kernels.softmax(x, backend=b), lambda: F.softmax(x, -1)),
        Case(
            "cross_entropy", lambda b: kernels.cross_entropy(x, target, backend=b), lambda: F.cross_entropy(x, target)
        ),
        Case("swiglu", lambda b: kernels.swiglu(x, x, backend=b), lambda: F.silu(x) * x),
        Case("rope", lambda b: kernels.rope(q, q, table, table, backend=b), None),
        Case(
            "rope_append",
            lambda b: kernels.rope_append(*[q[0]] * 3, table, table, target, pool, pool, target, backend=b),
            None,
        ),
        Case(
            "flash_decode, in pages",
            lambda b: kernels.flash_decode(q, pool, pool, target, block_table=pages, backend=b),
            None,
        ),
    ]


def python_calls(call: Call) -> int:
    """Functions that one call enters, those of C included, as cProfile counts them."""
    call()
    profile = cProfile.Profile()
    profile.enable()
    call()
    profile.disable()
    return pstats.Stats(profile).total_calls - 2  # the given call itself, and disable


def microseconds(call: Call) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile over rounds of many calls."""
    for _ in range(CALLS):
        call()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    low, median, high = statistics.quantiles(rounds, n=4)
    return low, median, high


def counts() -> dict[str, dict[str, int]]:
    """Op -> backend -> Python calls."""
    from .variants import on_a_gpu_that_is_not_there

    found = {case.name: {"cpu": python_calls(lambda c=case: c.ours(None))} for case in cases()}
    with on_a_gpu_that_is_not_there():
        for case in cases():
            found[case.name]["triton"] = python_calls(lambda c=case: c.ours("triton"))
    return found


def report() -> str:
    """Markdown."""
    from .variants import on_a_gpu_that_is_not_there

    calls = counts()
    ours = {case.name: microseconds(lambda c=case: c.ours(None)) for case in cases()}
    pytorch = {case.name: microseconds(case.pytorch) for case in cases() if case.pytorch}
    with on_a_gpu_that_is_not_there():
        triton = {case.name: microseconds(lambda c=case: c.ours("triton")) for case in cases()}
    lines = [
        "| one row | Python calls: cpu | triton | µs: cpu | triton, without the launch | PyTorch |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, count in calls.items():
        cells = [str(count["cpu"]), str(count["triton"])]
        cells += [_cell(times[name]) if name in times else "–" for times in (ours, triton, pytorch)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(times: tuple[float, float, float]) -> str:
    low, median, high = times
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/ too")
    arguments = parser.parse_args()
    import torch

    from .record import FOLDER
    from .timing import device_name, stamp

    torch.set_num_threads(1)
    table = report()
    print(table)
    if arguments.write:
        facts = ", ".join(f"{name} {value}" for name, value in stamp().items())
        path = FOLDER / device_name() / "dispatch.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# What a call costs on the host\n\n{facts}\n\n{table}")


if __name__ == "__main__":
    main()
