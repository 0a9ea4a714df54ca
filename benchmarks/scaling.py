"""What training costs against scale: step time and memory by model size, sequence length and number of processes.

    python -m benchmarks.scaling                  into benchmarks/results/<device>/
    python -m benchmarks.scaling --seconds 10     longer for each point

Every point is a training run of its own in fresh processes, steps as ``fastllm train`` takes them, next to the same
model on PyTorch's ops (on a GPU compiled). Beside the measured memory stands that of ``fastllm plan``; beyond the
processes that there are, the plan's alone. Writes scaling.json, scaling.md and scaling.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastllm.config import Config
from fastllm.console import short
from fastllm.data.loader import Sequences, TrainingData
from fastllm.data.packing import Concatenated
from fastllm.data.token_data import Documents
from fastllm.distributed.mesh import ParallelDims, local_device, process_group
from fastllm.distributed.parallelize import build_model
from fastllm.files import atomic, write_atomic
from fastllm.model.flops import count_parameters
from fastllm.planning.memory import estimate_memory
from fastllm.planning.presets import PRESETS
from fastllm.planning.scaling_laws import compute_optimal, model_of_depth
from fastllm.training.objectives import NextTokenPrediction
from fastllm.training.pretrain import pick_precision
from fastllm.training.signals import StopSignals
from fastllm.training.trainer import Trainer

from .cases import COMPILED, OURS, PYTORCH
from .record import FOLDER
from .timing import DEVICE, device_name, stamp

SIZE, LENGTH, PROCESSES = "model size", "sequence length", "processes"
ON_GPU = DEVICE.type == "cuda"
# glibc gives each large block a mapping of its own then, so that the process's memory is that of its tensors.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


@dataclass
class Point:
    """A training run. Seconds are of a step: the median and the quartiles about it; memory in bytes of a process."""

    axis: str
    at: int  # parameters, tokens or processes
    name: str
    implementation: str
    tokens: int  # of a step
    processes: int = 1
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    mfu: float = 0.0
    memory: float = 0.0
    planned: float = 0.0
    error: str = ""


def points() -> Iterator[tuple[Point, Config]]:
    """What is measured, and how it is configured."""
    implementations = (OURS, f"{OURS}, {COMPILED}", f"{PYTORCH}, {COMPILED}") if ON_GPU else (OURS, PYTORCH)
    for implementation in implementations:  # ours of every size first
        for name, config in _sizes().items():
            size = count_parameters(config.model)["total"]
            yield Point(SIZE, size, name, implementation, config.train.global_batch_tokens), config
    base = PRESETS["124m"] if ON_GPU else _small(4)
    for seq_len in (1024, 2048, 4096, 8192, 16_384) if ON_GPU else (128, 256, 512, 1024, 2048):
        tokens = 32_768 if ON_GPU else 2048
        config = _with(base, tokens, max(1, tokens // seq_len), seq_len)
        for implementation in (implementations[0], implementations[-1]):
            yield Point(LENGTH, seq_len, f"{seq_len} tokens", implementation, tokens), config
    most = torch.cuda.device_count() if ON_GPU else 4
    tokens = 262_144 if ON_GPU else 2048
    for processes in (n for n in (1, 2, 4, 8) if n <= most):
        name = f"{processes} process" + ("es" if processes > 1 else "")
        yield Point(PROCESSES, processes, name, OURS, tokens, processes), _with(base, tokens, tokens // 1024 or 1)


def _sizes() -> dict[str, Config]:
    if ON_GPU:
        sizes = {"124m": (131_072, 32), "350m": (65_536, 16), "1.5b": (32_768, 8)}
        return {name: _with(PRESETS[name], *size) for name, size in sizes.items()}
    return {f"depth {layers}": _with(_small(layers), 1024, 4, 256) for layers in (1, 2, 4, 6)}


def _small(layers: int) -> Config:
    return compute_optimal(replace(model_of_depth(layers, 4096, 256), layers=layers), 4)


def _with(config: Config, global_batch_tokens: int, micro_batch: int, seq_len: int | None = None) -> Config:
    model = replace(config.model, max_seq_len=seq_len or config.model.max_seq_len)
    train = replace(config.train, global_batch_tokens=global_batch_tokens, micro_batch=micro_batch)
    return replace(config, model=model, train=train)


# ---- a run ----


def measure(point: Point, config: Config, seconds: float) -> None:
    """Fill in the point."""
    if point.implementation == OURS:  # the others keep more for the backward pass
        with warnings.catch_warnings(action="ignore"):
            point.planned = estimate_memory(config, point.processes, pick_precision("auto", DEVICE)).total
    try:
        timed = _run(point, config, seconds, {})
        exact = timed if ON_GPU or point.implementation != OURS else _run(point, config, 0.0, EXACT)
    except Exception as error:
        point.error = str(error).strip().splitlines()[-1][:200]
        return
    times = timed["times"]
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    point.seconds, point.low, point.high = middle, low, high
    point.mfu, point.memory = timed["share"] * point.tokens / middle, exact["memory"]


def _run(point: Point, config: Config, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            mp.spawn(_train, (port, point, config, seconds, folder), nprocs=point.processes)
        finally:
            os.environ.clear()
            os.environ.update(before)
        return json.loads(Path(folder, "measured.json").read_text())


def _train(rank: int, port: int, point: Point, config: Config, seconds: float, folder: str) -> None:
    from .steps import IN_PLACE, only

    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": point.processes, "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in found.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // point.processes))
    torch.set_float32_matmul_precision("high")
    config = replace(config, parallel=replace(config.parallel, compile=COMPILED in point.implementation))
    device = local_device()
    precision = pick_precision(config.train.precision, device)
    with process_group(device), only(tuple(IN_PLACE) if OURS in point.implementation else ()):
        dims = ParallelDims.from_config(config.parallel, device.type)

        def make(config: Config) -> Trainer:
            model = build_model(config, dims, precision, device)
            data = random_data(config)
            where = {"run_dir": Path(folder), "device": device, "precision": precision, "signals": StopSignals()}
            return Trainer(config, dims, model, NextTokenPrediction(), data, None, **where)

        if not ON_GPU:
            # What PyTorch takes for itself, at any number of layers: oneDNN compiles code for each shape of a product.
            make(replace(config, model=replace(config.model, layers=1))).train_step()
            gc.collect()
        before = 0 if ON_GPU else _status("VmRSS")
        if not ON_GPU:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        trainer = make(config)
        times = [_step(trainer) for _ in range(3)]
        if seconds:
            count = torch.tensor(max(5.0, seconds / times[-1]))
            dist.broadcast(count, 0)  # all must take as many
            times += [_step(trainer) for _ in range(int(count))]
        used = torch.cuda.max_memory_allocated() if ON_GPU else _status("VmHWM") - before
    if rank == 0:
        measured = {"times": times[3:] or times, "memory": used, "share": trainer.mfu_per_token}
        Path(folder, "measured.json").write_text(json.dumps(measured))


class RandomTokens:
    """A document of random tokens."""

    eos_id = 0

    def __init__(self, vocab_size: int, n: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, n).astype(np.uint32)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def random_data(config: Config) -> TrainingData:
    """One long document: no attention is saved between documents."""
    n, seq_len = 200_000, config.model.max_seq_len
    documents = Documents(np.zeros(1, np.int64), np.array([n], np.uint32))
    tokens = RandomTokens(config.model.vocab_size, n)
    packing = Concatenated(documents.lengths, seq_len, config.train.seed)
    return TrainingData([Sequences(tokens, documents, packing, seq_len)], config.train.seed)


def _step(trainer: Trainer) -> float:
    start = time.perf_counter()
    trainer.train_step()
    trainer.metrics.grad_norm.item()
    return time.perf_counter() - start


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# ---- what it gives ----


def beyond(counts: tuple[int, ...] = (8, 32, 128, 1024)) -> dict[str, dict[int, float]]:
    """Bytes in a process of the plan, by model and processes."""
    found: dict[str, dict[int, float]] = {}
    with warnings.catch_warnings(action="ignore"):
        for name in ("1.5b", "8b", "70b"):
            config = PRESETS[name]
            config = replace(config, train=replace(config.train, micro_batch=1, global_batch_tokens=2**22))
            found[name] = {n: estimate_memory(config, n, torch.bfloat16).total for n in counts}
    return found


def table(measured: list[Point]) -> str:
    lines = []
    for axis in (SIZE, LENGTH, PROCESSES):
        lines += ["", f"| {axis} | implementation | ms a step | quartiles | tokens/s | MFU | memory MiB | planned |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
        for p in measured:
            if p.axis == axis:
                name = f"{p.name} ({short(p.at)})" if axis == SIZE else p.name
                numbers = (
                    f"{p.seconds * 1e3:.1f} | {p.low * 1e3:.1f}–{p.high * 1e3:.1f} | {p.tokens / p.seconds:,.0f} | "
                    f"{p.mfu:.1%} | {p.memory / 2**20:.0f} | " + (f"{p.planned / 2**20:.0f} |" if p.planned else "|")
                    if p.seconds else f"{p.error} | | | | | |"
                )  # fmt: skip
                lines.append(f"| {name} | {p.implementation} | {numbers}")
    return "\n".join(lines).strip() + "\n"


def draw(measured: list[Point], simulated: dict[str, dict[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained")
    for column, axis in zip(figure.subplots(2, 3).T, (SIZE, LENGTH, PROCESSES), strict=True):
        here = [p for p in measured if p.axis == axis and p.seconds]
        for name in dict.fromkeys(p.implementation for p in here):
            own = [p for p in here if p.implementation == name]
            column[0].errorbar(
                [p.at for p in own], [p.seconds * 1e3 for p in own], fmt="o-", label=name, capsize=3,
                yerr=[[(p.seconds - p.low) * 1e3 for p in own], [(p.high - p.seconds) * 1e3 for p in own]],
            )  # fmt: skip
        ours = [p for p in here if p.implementation == OURS]
        column[1].plot([p.at for p in ours], [p.memory / 2**30 for p in ours], "o-", label=f"{OURS}, measured")
        column[1].plot([p.at for p in ours], [p.planned / 2**30 for p in ours], "x--", label="fastllm plan")
        if axis == PROCESSES:
            for name, found in simulated.items():
                column[1].plot(list(found), [b / 2**30 for b in found.values()], ".:", label=f"{name}, plan")
        column[0].set(title=f"step time against {axis}", ylabel="ms a step")
        column[1].set(title=f"memory of a process against {axis}", ylabel="GiB", xlabel=axis)
        for plot in column:
            plot.set_xscale("log", base=10 if axis == SIZE else 2)
            if axis == SIZE or (axis == PROCESSES and plot is column[1]):
                plot.set_yscale("log")
            else:
                plot.set_ylim(0, None)
            plot.grid(alpha=0.3)
            plot.legend(fontsize=8)
    figure.suptitle(", ".join(f"{k} {v}" for k, v in stamp().items() if k in ("device", "torch", "commit")), fontsize=9)
    with atomic(path) as part:
        figure.savefig(part, format="png", facecolor="white")


def main() -> int:
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling", description=head, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER / device_name(), metavar="DIR", help="where it is written")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each point")
    parser.add_argument("--only", nargs="+", choices=(SIZE, LENGTH, PROCESSES), help="these alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    measured: list[Point] = []
    known = arguments.out / "scaling.json"
    if arguments.only and known.exists():
        points_before = [Point(**p) for p in json.loads(known.read_text())["points"]]
        measured = [p for p in points_before if p.axis not in arguments.only]
    try:
        for point, config in points():
            if arguments.only and point.axis not in arguments.only:
                continue
            measure(point, config, arguments.seconds)
            measured.append(point)
            told = f"{point.seconds * 1e3:.1f} ms, MFU {point.mfu:.0%}" if point.seconds else point.error
            print(f"{point.axis}: {point.name}, {point.implementation}: {told}", flush=True)
            content = {"stamp": stamp(), "points": [asdict(p) for p in measured]}
            write_atomic(known, (json.dumps(content, indent=1) + "\n").encode())
            write_atomic(arguments.out / "scaling.md", table(measured).encode())
    except KeyboardInterrupt:
        print("interrupted: the table has what was measured")
    draw(measured, beyond(), arguments.out / "scaling.png")
    print(table(measured))
    return 1 if any(p.error for p in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
