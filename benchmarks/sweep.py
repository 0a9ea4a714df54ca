"""Time and peak memory of a head with its loss, against the vocabulary and against the number of tokens.

    python -m benchmarks.sweep --out benchmarks/results/<device>

Forward and backward of linear + cross_entropy in PyTorch (eager and torch.compile) and of fastllm's
linear_cross_entropy, in bfloat16. Writes ``linear_cross_entropy.png`` and the numbers behind it,
``linear_cross_entropy.json``, into DIR. Implementations take turns, so that a slow moment hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import CLOCK, DEVICE, extra_memory, stamp
from fastllm.kernels import linear_cross_entropy

ON_GPU = DEVICE.type == "cuda"
FEATURES = 4096 if ON_GPU else 256
TOKENS = [1024, 2048, 4096, 8192, 16384] if ON_GPU else [256, 512, 1024, 2048, 4096]
CLASSES = [8192, 16384, 32768, 65536, 131072] if ON_GPU else [4096, 8192, 16384, 32768, 65536]
FIXED_TOKENS, FIXED_CLASSES = (8192, 32768) if ON_GPU else (1024, 16384)
ROUNDS = 20 if ON_GPU else 3


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def measured(tokens: int, classes: int) -> list[dict[str, Any]]:
    """A row for each implementation: median and spread of the seconds, and bytes at the peak."""
    torch._dynamo.reset()
    losses: dict[str, Callable] = {"eager": eager, "compile": torch.compile(eager), "fastllm": linear_cross_entropy}
    hidden = torch.randn(tokens, FEATURES, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = torch.randn(classes, FEATURES, dtype=torch.bfloat16, device=DEVICE) * FEATURES**-0.5
    weight.requires_grad_()
    target = torch.randint(classes, (tokens,), device=DEVICE)

    def step(loss: Callable) -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, target).backward()

    rows = []
    for name, loss in losses.items():
        step(loss)
        hidden.grad = weight.grad = None
        memory = extra_memory(lambda loss=loss: step(loss))
        rows.append({"implementation": name, "tokens": tokens, "classes": classes, "memory": memory, "seconds": []})
    for _ in range(ROUNDS):
        for row in rows:
            before = CLOCK()
            CLOCK.timed(lambda name=row["implementation"]: step(losses[name]))()
            row["seconds"].append(CLOCK() - before)
    for row in rows:
        times = sorted(row.pop("seconds"))
        row |= {"seconds": statistics.median(times), "fastest": times[0], "slowest": times[-1]}
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", layout="constrained")
    for column, (sweep, along) in enumerate((("vocabulary", "classes"), ("tokens", "tokens"))):
        rows = result[sweep]
        fixed = f"{FIXED_TOKENS} tokens" if along == "classes" else f"{FIXED_CLASSES} classes"
        for name, marker in (("eager", "o"), ("compile", "s"), ("fastllm", "D")):
            mine = [r for r in rows if r["implementation"] == name]
            x = [r[along] for r in mine]
            low, high = ([abs(r[end] - r["seconds"]) * 1e3 for r in mine] for end in ("fastest", "slowest"))
            axes[0, column].errorbar(
                x, [r["seconds"] * 1e3 for r in mine], (low, high), marker=marker, capsize=3, label=name
            )
            if all(r["memory"] for r in mine):
                axes[1, column].plot(x, [r["memory"] / 2**20 for r in mine], marker=marker, label=name)
        axes[0, column].set_title(f"{fixed}, {FEATURES} features, bfloat16")
        axes[1, column].set_xlabel(along)
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.grid(True, which="both", alpha=0.25)
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend()
    figure.suptitle(f"A head with its loss on {result['stamp']['device']}")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    points = {
        "vocabulary": [(FIXED_TOKENS, classes) for classes in CLASSES],
        "tokens": [(tokens, FIXED_CLASSES) for tokens in TOKENS],
    }
    result: dict[str, Any] = {"stamp": stamp()}
    for sweep, sizes in points.items():
        result[sweep] = []
        for tokens, classes in sizes:
            result[sweep] += measured(tokens, classes)
            ours, theirs = result[sweep][-1], result[sweep][-3]
            print(
                f"{tokens} tokens, {classes} classes: {theirs['seconds'] / ours['seconds']:.2f} times eager "
                f"({ours['seconds'] * 1e3:.0f} ms)",
                flush=True,
            )
    path = out / "linear_cross_entropy.json"
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(written, path)
    plot(result, path.with_suffix(".png"))
    print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
