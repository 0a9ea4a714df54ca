"""Attention with its warps specialised, as compiled for sm_90 and run in numpy, against PyTorch.

python -m tests.ttgir.attention     without TRITON_INTERPRET: JSON, the cases' names to what is wrong
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.targets import current_target, specialized_attention
from fastllm.kernels.attention import reference, triton_tuning
from fastllm.kernels.attention.options import UNBOUNDED, Options
from fastllm.kernels.triton_launch import Kernel

from .emulator import Memory, execute

# Several tiles of 128 rows, the last of them not full.
CASES: dict[str, dict[str, Any]] = {
    "causal": {"lengths": [(300, 300)]},
    "causal, more keys": {"lengths": [(140, 310)], "dim": 128},
    "full": {"lengths": [(200, 270)], "right": UNBOUNDED},
    "forward alone": {"lengths": [(200, 270)], "dim": 256, "backward": False},
    "window": {"lengths": [(290, 333)], "left": 90},
    "packed, sinks": {"lengths": [(150, 150), (3, 70), (0, 9), (160, 161)], "packed": True, "sinks": True},
    "packed, window, softcap, sinks": {
        "lengths": [(131, 150), (1, 1), (140, 260)], "packed": True, "sinks": True, "left": 70, "softcap": 5.0,
    },
}  # fmt: skip


@contextmanager
def emulated(
    launched: dict[str, str], order: Sequence[int] = (0, 1, 2), plant: Callable[[str], str] = str
) -> Iterator[None]:
    """Kernels are compiled for sm_90 and run in numpy, attention's with specialised warps.

    ``launched`` gets the code of each by its name; ``plant`` changes it before it runs. ``order``: see Program.
    """

    def run(
        kernel: Kernel, grid: Any, tensors: Any, numbers: Any, constants: Any, warps: int = 4, **options: int
    ) -> None:
        with current_target("sm_90a"):
            code = kernel.compile(tensors, numbers, constants, warps, **options).asm["ttgir"]
        launched[kernel.name] = code
        memories: dict[int, Memory] = {}  # one for tensors that begin at the same place
        values = [None if t is None else memories.setdefault(t.data_ptr(), Memory(t)) for t in tensors]
        names = inspect.signature(kernel.jit.fn).parameters
        arguments = dict(zip(names, [*values, *numbers, *constants], strict=True))
        execute(plant(code), arguments, grid[0], order)
        for memory in memories.values():
            memory.finish()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Kernel, "__call__", run))
        stack.enter_context(mock.patch.object(triton_tuning, "architecture", return_value="sm_90a"))
        yield


def wrong(
    lengths: list[tuple[int, int]],
    dim: int = 64,
    left: int = UNBOUNDED,
    right: int = 0,
    softcap: float = 0.0,
    packed: bool = False,
    sinks: bool = False,
    backward: bool = True,
    order: Sequence[int] = (0, 1, 2),
) -> str:
    """What is wrong with the results of a case: more than PyTorch's own error twice, by the norm, or nothing."""
    torch.manual_seed(0)
    heads, kv_heads, options = 2, 1, Options(dim**-0.5, left, right, softcap)
    total = [sum(n) for n in zip(*lengths, strict=True)]
    q, dout = (torch.randn(total[0], heads, dim).bfloat16() for _ in range(2))
    k, v = (torch.randn(total[1], kv_heads, dim).bfloat16() for _ in range(2))
    sink = torch.randn(heads) if sinks else None
    cu = [torch.tensor([0, *n]).cumsum(0) for n in zip(*lengths, strict=True)]
    packing = (*cu, *(max(n) for n in zip(*lengths, strict=True))) if packed else (None, None, 0, 0)
    launched: dict[str, str] = {}
    with emulated(launched, order), specialized_attention(softcap > 0):
        given = [t if packed else t.unsqueeze(0) for t in (q, k, v)]
        out, lse = torch.ops.fastllm.attention_forward(*given, sink, *packing, *options, True, True, "triton")
        upstream = (dout if packed else dout.unsqueeze(0), None)
        rest = (out, lse, *packing, *options, False, "triton")
        grads = torch.ops.fastllm.attention_backward(*upstream, *given, *rest)[:3] if backward else given
    found = [t.reshape(s.shape) for t, s in zip((out, *grads), (q, q, k, v), strict=True)]
    eager, exact = (_of_torch(q, k, v, dout, sink, cu, options, dtype) for dtype in (torch.bfloat16, torch.float64))
    found.append(lse.reshape(heads, -1))
    said = []
    for name, a, b, c in zip(("out", "dq", "dk", "dv", "lse"), found, eager, exact, strict=True):
        if name[0] == "d" and not backward:
            continue
        seen = torch.isfinite(c)
        error, own = ((x.double() - c)[seen].norm() for x in (a, b))
        rounding = torch.finfo(a.dtype).eps * c[seen].norm()
        if not error <= 2 * own + rounding:
            said.append(f"{name} {error:.1e}, PyTorch's {own:.1e}")
    expected = ("forward", "dkdv", "dq") if backward else ("forward",)
    said += [f"no {name}" for name in expected if f"specialized_{name}" not in launched]
    return "; ".join(said)


def _of_torch(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sinks: Tensor | None, cu: list[Tensor], options: Options,
              dtype: torch.dtype) -> list[Tensor]:  # fmt: skip
    """out, dq, dk, dv and lse, sequence by sequence."""
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    outs, lses = [], []
    for i in range(len(cu[0]) - 1):
        (a, b), (c, d) = (x[i : i + 2].tolist() for x in cu)
        one = [leaves[0][a:b], leaves[1][c:d], leaves[2][c:d]]
        out, lse = _scores(*(t.unsqueeze(0) for t in one), sinks, options)
        outs.append(out[0])
        lses.append(lse[0])
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype)), torch.cat(lses, 1).detach()]


def _scores(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    seen = reference._visible(q.shape[2], k.shape[2], options.left, options.right, q.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    out = scores.softmax(-1).nan_to_num()[..., : k.shape[2]] @ v
    return out.transpose(1, 2), torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, -1)


WAIT = re.compile(r"^.*ttng\.wait_barrier.*\n", re.MULTILINE)
ORDERS = list(itertools.permutations(range(3)))


def unseen_faults() -> list[str]:
    """The waits of the forward kernel without which everything is as before, in each order of the groups of warps."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 520, 1, 64).bfloat16() for _ in range(3))
    rest = (None, None, None, 0, 0, *Options(0.125, UNBOUNDED, 0, 0.0), True, True, "triton")
    launched: dict[str, str] = {}

    def forward(order: Sequence[int], plant: Callable[[str], str] = str) -> list[Tensor]:
        with emulated(launched, order, plant), specialized_attention():
            return list(torch.ops.fastllm.attention_forward(q, k, v, *rest))

    right = forward(ORDERS[0])
    found = ["an order" for order in ORDERS if not all(map(torch.equal, forward(order), right))]
    waits = list(WAIT.finditer(launched["specialized_forward"]))
    for i, wait in enumerate(waits):

        def without(code: str, i: int = i) -> str:
            at = list(WAIT.finditer(code))[i]
            return code[: at.start()] + code[at.end() :]

        def shows(order: Sequence[int], plant: Callable[[str], str] = without) -> bool:
            try:
                return not all(map(torch.equal, forward(order, plant), right))
            except (RuntimeError, AssertionError):
                return True

        # a tile that is filled once is empty from the start
        if "%c1_i32" not in wait.group() and not any(map(shows, ORDERS)):
            found.append(wait.group().strip())
    return [f"{len(waits)} waits", *found]


def main() -> dict[str, Any]:
    orders = itertools.cycle(ORDERS)
    return {name: wrong(**case, order=next(orders)) for name, case in CASES.items()} | {"faults": unseen_faults()}


if __name__ == "__main__":
    print(json.dumps(main()))
