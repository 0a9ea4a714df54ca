"""Time and peak memory along one size: of a head with its loss, and of attention.

    python -m benchmarks.sweep --out benchmarks/results/<device>

``linear_cross_entropy``: forward and backward of linear + cross_entropy in PyTorch (eager and torch.compile) and of
fastllm's linear_cross_entropy, against the vocabulary and the number of tokens. ``attention``: causal attention,
forward and backward, against the sequence length; "explicit" holds all scores. All in bfloat16. Writes NAME.png and
the numbers behind it, NAME.json, into DIR. Implementations take turns, so that a slow moment hits all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import DEVICE, Row, in_turn, stamp, write
from fastllm.kernels import flash_attention, linear_cross_entropy

ON_GPU = DEVICE.type == "cuda"
ROUNDS = 20 if ON_GPU else 3

FEATURES = 4096 if ON_GPU else 256
TOKENS = [1024, 2048, 4096, 8192, 16384] if ON_GPU else [256, 512, 1024, 2048, 4096]
CLASSES = [8192, 16384, 32768, 65536, 131072] if ON_GPU else [4096, 8192, 16384, 32768, 65536]
FIXED_TOKENS, FIXED_CLASSES = (8192, 32768) if ON_GPU else (1024, 16384)

HEADS, HEAD_DIM = (16, 128) if ON_GPU else (2, 64)
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768] if ON_GPU else [1024, 2048, 4096, 8192, 16384]
MOST_SCORES = 2**31  # bytes of scores that "explicit" may hold


def eager_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def head_and_loss(tokens: int, classes: int) -> list[Row]:
    torch._dynamo.reset()
    losses = {"eager": eager_loss, "compile": torch.compile(eager_loss), "fastllm": linear_cross_entropy}
    hidden = torch.randn(tokens, FEATURES, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = torch.randn(classes, FEATURES, dtype=torch.bfloat16, device=DEVICE) * FEATURES**-0.5
    weight.requires_grad_()
    target = torch.randint(classes, (tokens,), device=DEVICE)

    def step(loss: Callable) -> None:
        loss(hidden, weight, target).backward()
        hidden.grad = weight.grad = None

    return in_turn({name: partial(step, loss) for name, loss in losses.items()}, ROUNDS, tokens=tokens, classes=classes)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seq = q.shape[2]
    future = torch.ones(seq, seq, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).masked_fill(future, float("-inf"))
    return scores.softmax(-1) @ v


def attention(seq: int) -> list[Row]:
    q, k, v, g = (torch.randn(1, seq, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(4))
    heads_first = [t.transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
    heads_last = [t.requires_grad_() for t in (q, k, v)]
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True)

    def step(call: Callable, inputs: list[Tensor], kernel: SDPBackend | None = None) -> None:
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            out = call(*inputs)
            out.backward(g.view_as(out))
        for t in inputs:
            t.grad = None

    steps = {"SDPA": partial(step, sdpa, heads_first), "fastllm": partial(step, flash_attention, heads_last)}
    if ON_GPU:
        kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        steps |= {f"SDPA, {name}": partial(step, sdpa, heads_first, kernel) for name, kernel in kernels.items()}
    if HEADS * seq * seq * 2 <= MOST_SCORES:
        steps["explicit"] = partial(step, explicit, heads_first)
    return in_turn(steps, ROUNDS, tokens=seq)


# name -> (heading, what runs) of its columns
SWEEPS: dict[str, Callable[[], dict[str, list[Row]]]] = {
    "linear_cross_entropy": lambda: {
        f"classes, {FIXED_TOKENS} tokens, {FEATURES} features": [
            row for classes in CLASSES for row in head_and_loss(FIXED_TOKENS, classes)
        ],
        f"tokens, {FIXED_CLASSES} classes, {FEATURES} features": [
            row for tokens in TOKENS for row in head_and_loss(tokens, FIXED_CLASSES)
        ],
    },
    "attention": lambda: {
        f"tokens, {HEADS} heads of {HEAD_DIM}": [row for seq in LENGTHS for row in attention(seq)],
    },
}


def plot(name: str, facts: dict[str, str], columns: dict[str, list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    size = (5 * len(columns) + 1, 7)
    figure, axes = plt.subplots(2, len(columns), figsize=size, sharex="col", squeeze=False, layout="constrained")
    for column, (heading, rows) in enumerate(columns.items()):
        along, _, rest = heading.partition(", ")
        for implementation, marker in zip(dict.fromkeys(r["implementation"] for r in rows), "osD^v", strict=False):
            mine = [r for r in rows if r["implementation"] == implementation]
            x = [r[along] for r in mine]
            spread = [[abs(r[end] - r["seconds"]) * 1e3 for r in mine] for end in ("fastest", "slowest")]
            times = [r["seconds"] * 1e3 for r in mine]
            axes[0, column].errorbar(x, times, spread, marker=marker, capsize=3, label=implementation)
            if all(r["memory"] for r in mine):
                axes[1, column].plot(x, [r["memory"] / 2**20 for r in mine], marker=marker, label=implementation)
        axes[0, column].set_title(f"{rest}, bfloat16")
        axes[1, column].set_xlabel(along)
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.grid(True, which="both", alpha=0.25)
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend()
    figure.suptitle(f"{name} on {facts['device']}")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--only", choices=SWEEPS, help="one of the two")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in [arguments.only] if arguments.only else SWEEPS:
        facts, columns = stamp(), SWEEPS[name]()
        path = arguments.out / f"{name}.json"
        write(path, {"stamp": facts, "columns": columns})
        plot(name, facts, columns, path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
