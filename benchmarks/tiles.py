"""Each Triton attention kernel over tiles, on this GPU: causal, bfloat16, head dimensions 64, 128 and 256.

    python -m benchmarks.tiles                    into benchmarks/results/<device>/tiles.json and tiles.md
    python -m benchmarks.tiles --only dq --dims 128       these alone, printed and not written

A tile is compiled, checked against PyTorch's attention, and timed by CUDA events about its kernel alone. Operations
are those that the kernel does: 2 products of the visible scores forward, 4 for dK and dV, 3 for dQ; decoding is a read
of the cache. `python -m benchmarks --defaults` makes the fastest the default on this kind of GPU. A tile that can't be
compiled or launched, or is wrong, has its error in the table, and the search continues.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.files import write_atomic
from fastllm.kernels.attention.options import UNBOUNDED, Options
from fastllm.kernels.attention.packing import UNPACKED

from . import apart
from .attention import sdpa
from .record import FOLDER
from .timing import AHEAD, CLOCK, DEVICE, device_name, stamp

FILE = "tiles.json"
KERNELS, DIMS = ("forward", "dkdv", "dq", "decode"), (128, 64, 256)  # what matters most is first
PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3}
ROUNDS = 12
PATIENCE = 40.0  # seconds for one tile
WORKERS = 12
WITHIN = 0.01  # the largest ‖difference‖ / ‖PyTorch's result‖; bfloat16 gives a third of it, a wrong tile far more
WORTH = 0.02  # by how much a tile must be faster than the table's
TileSize = tuple[int, int, int, int, bool]  # queries, keys, warps, stages, specialised

# Of the kernels that aren't specialised, tried after the tile of kernels/attention/triton_tuning.py.
CANDIDATES: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "forward": {
        64: ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3),
             (128, 128, 4, 2)),
        128: ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3),
              (128, 32, 4, 3)),
        256: ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 3), (128, 32, 8, 2)),
    },
    "dkdv": {
        64: ((64, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (32, 128, 8, 3), (64, 128, 8, 3)),
        128: ((32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 1),
              (32, 64, 4, 3)),
        256: ((16, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1), (64, 64, 8, 1), (16, 64, 4, 2), (32, 32, 4, 2)),
    },
    "dq": {
        64: ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2)),
        128: ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 128, 8, 2), (128, 32, 8, 3), (128, 32, 4, 2),
              (64, 64, 8, 3)),
        256: ((64, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1), (64, 64, 8, 2), (128, 32, 8, 2), (32, 64, 4, 2)),
    },
    "decode": {
        64: ((64, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (64, 256, 8, 2), (64, 64, 8, 3)),
        128: ((64, 64, 8, 3), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 4, 2), (64, 32, 4, 4), (64, 128, 8, 3)),
        256: ((32, 64, 4, 3), (32, 32, 4, 3), (32, 64, 8, 3), (32, 64, 4, 2), (32, 128, 8, 2), (32, 32, 4, 4)),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    width: int  # heads · head_dim
    cache: int  # tokens to decode against, with 32 heads to 4


SHAPE = Shape(2, 8192, 2048, 16384)


@dataclass
class Tile:
    """A kernel with one tile. Seconds: the median, and the quartiles about it; 0: it failed, with ``error``."""

    kernel: str
    dim: int
    tile: TileSize
    work: float  # operations, of decode bytes
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.dim}: {said(self.tile)}"


def tiles(kernels: Sequence[str] = KERNELS, dims: Sequence[int] = DIMS) -> list[Tile]:
    """What is tried: of each kernel and dimension the table's tile first."""
    from fastllm.kernels.attention import triton_tuning

    found = []
    for dim in (d for d in DIMS if d in dims):
        for kernel in (k for k in KERNELS if k in kernels):
            target = triton_tuning.architecture(DEVICE)
            table = triton_tuning.default(kernel, target, dim, 2, False)
            special = triton_tuning.specialized(kernel, target, dim, False)
            candidates = ((*tile, False) for tile in CANDIDATES[kernel][dim])
            each = dict.fromkeys((tuple(table), *map(tuple, special), *candidates))
            found += [Tile(kernel, dim, tile, _work(kernel, dim, SHAPE)) for tile in each]
    return found


def said(tile: TileSize) -> str:
    m, n, warps, stages, specialized = tile
    return f"{m}×{n}, {warps} warps, {stages} stages" + (", specialised" if specialized else "")


def _work(kernel: str, dim: int, shape: Shape) -> float:
    if kernel == "decode":
        return 2 * 2 * 16 * shape.cache * 4 * dim
    return PRODUCTS[kernel] * shape.batch * shape.width * shape.tokens**2


# ---- one tile ----


class Launch(NamedTuple):
    call: Callable[[], None]
    outputs: list[Tensor]
    expected: list[Tensor]


@functools.lru_cache(maxsize=2)
def prepared(kernel: str, dim: int, shape: Shape = SHAPE) -> Launch:
    """The call of the kernel's launcher, what it writes, and what PyTorch makes of the same inputs."""
    from fastllm.kernels.attention import triton_kernels as launchers

    torch.manual_seed(0)
    draw = partial(torch.randn, dtype=torch.bfloat16, device=DEVICE)
    options, packing = Options(dim**-0.5, UNBOUNDED, 0, 0.0), UNPACKED
    if kernel == "decode":
        q, (k, v) = draw(16, 1, 32, dim), (draw(16, shape.cache, 4, dim) for _ in range(2))
        out, lse = torch.empty_like(q), torch.empty(16, 32, 1, device=DEVICE)
        call = partial(launchers.attention_decode, q, k, v, None, None, None, options, "triton", out, lse)
        return Launch(call, [out], [sdpa(q, k, v, enable_gqa=True)])
    heads = shape.width // dim
    q, k, v, dout = (draw(shape.batch, shape.tokens, heads, dim) for _ in range(4))
    out, lse = torch.empty_like(q), torch.empty(shape.batch, heads, shape.tokens, device=DEVICE)
    forward = partial(launchers.attention_forward, q, k, v, None, packing, options, "triton", out, lse)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    theirs = sdpa(*leaves, is_causal=True)
    if kernel == "forward":
        return Launch(forward, [out], [theirs.detach()])
    forward()
    dq, dk, dv, delta = (torch.empty_like(t) for t in (q, k, v, lse))
    given = (dout, None, q, k, v, out, lse, packing, options, True, "triton", dq, dk, dv, delta)
    grads = torch.autograd.grad(theirs, leaves, dout)
    mine = slice(0, 1) if kernel == "dq" else slice(1, 3)
    return Launch(partial(launchers.attention_backward, *given), [dq, dk, dv][mine], list(grads[mine]))


@contextmanager
def chosen(kernel: str, tile: TileSize, mark: Callable[[str], Any]) -> Iterator[None]:
    """``kernel`` with this tile, the others with the table's; ``mark`` hears of each before it is launched."""
    from fastllm.kernels.attention import triton_tuning

    default = triton_tuning.default

    def choose(name: str, *rest: Any) -> triton_tuning.Config:
        mark(name)
        return triton_tuning.Config(*tile) if name == kernel else default(name, *rest)

    triton_tuning.default = choose
    try:
        yield
    finally:
        triton_tuning.default = default


def check(kernel: str, tile: TileSize, launch: Launch) -> None:
    """Launches it once, and raises where the result is not PyTorch's."""
    for output in launch.outputs:
        output.fill_(float("nan"))
    asked: list[str] = []
    with chosen(kernel, tile, asked.append):
        launch.call()
    if kernel not in asked:
        raise AssertionError("triton_tuning.default was not asked for a tile")
    for output, expected in zip(launch.outputs, launch.expected, strict=True):
        error = float((output.float() - expected.float()).norm() / expected.float().norm())
        if not error < WITHIN:
            raise AssertionError(f"wrong result: error {error:.1e} of PyTorch's norm")


def measure(kernel: str, tile: TileSize, launch: Launch) -> dict[str, float]:
    """Seconds of the kernel alone: its quartiles."""
    times: list[float] = []
    marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((name, event))

    with chosen(kernel, tile, mark):
        for _ in range(2 + ROUNDS):
            marks.clear()
            CLOCK.overwrite_cache()
            torch.cuda._sleep(AHEAD[1])  # until all of it is enqueued
            launch.call()
            mark("end")
            torch.cuda.synchronize()
            first = [name for name, _ in marks].index(kernel)
            times.append(marks[first][1].elapsed_time(marks[first + 1][1]) / 1e3)
    low, seconds, high = statistics.quantiles(times[2:], n=4, method="inclusive")
    return {"seconds": seconds, "low": low, "high": high}


def job(tile: Tile, *, time_it: bool) -> dict[str, float]:
    launch = prepared(tile.kernel, tile.dim)
    check(tile.kernel, tile.tile, launch)
    return measure(tile.kernel, tile.tile, launch) if time_it else {}


# ---- what is found ----


def winners(found: Sequence[Tile]) -> dict[tuple[str, int], TileSize]:
    """The fastest of each kernel and dimension; the first, the table's, where the others gain next to nothing."""
    best: dict[tuple[str, int], TileSize] = {}
    groups: dict[tuple[str, int], list[Tile]] = {}
    for tile in found:
        groups.setdefault((tile.kernel, tile.dim), []).append(tile)
    for key, group in groups.items():
        ran = [t for t in group if t.seconds]
        if ran:
            fastest = min(ran, key=lambda t: t.seconds)
            first = group[0]
            keep = first.seconds and first.seconds <= fastest.seconds * (1 + WORTH)
            best[key] = (first if keep else fastest).tile
    return best


def table(found: Sequence[Tile]) -> str:
    best = winners(found)
    lines = [
        "| kernel | head_dim | queries×keys | ms | ± | rate | |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for t in found:
        unit, scale = ("GB/s", 1e9) if t.kernel == "decode" else ("TFLOP/s", 1e12)
        note = "**the fastest**" if best.get((t.kernel, t.dim)) == t.tile else t.error.replace("|", "/")
        numbers = " | | "
        if t.seconds:
            numbers = f"{t.seconds * 1e3:.3g} | {(t.high - t.low) * 500:.2g} | {t.work / t.seconds / scale:,.0f} {unit}"
        lines.append(f"| {t.kernel} | {t.dim} | {said(t.tile)} | {numbers} | {note} |")
    return "\n".join(lines) + "\n"


def write(found: Sequence[Tile], out: Path | None) -> None:
    """Nothing over what there is, where nothing was measured."""
    if out is None or not any(t.seconds for t in found):
        return
    content = {"stamp": stamp(), "tiles": [asdict(t) for t in found]}
    write_atomic(out / FILE, (json.dumps(content, indent=1) + "\n").encode())
    write_atomic(out / "tiles.md", table(found).encode())


def read(path: Path) -> tuple[dict[str, str], list[Tile]]:
    """The stamp and the tiles."""
    content = json.loads(path.read_text())
    return content["stamp"], [Tile(**{**t, "tile": tuple(t["tile"])}) for t in content["tiles"]]


def search(planned: Sequence[Tile], command: Sequence[str], out: Path | None, compile_for: float) -> int:
    """Compiles side by side, for as long, into Triton's cache; then times one after another what did not fail. Writes
    after each."""
    names, begun = [t.name for t in planned], time.monotonic()
    known: dict[str, Tile] = {t.name: t for t in planned}

    def found() -> list[Tile]:
        return [t for t in planned if t.seconds or t.error]

    try:
        compiling = apart.run_all(apart.shares(names, WORKERS), [*command, "--compile"], PATIENCE)
        for outcome in compiling:
            known[outcome.name].error = outcome.error
            if time.monotonic() - begun > compile_for:
                compiling.close()
        print(f"compiled in {time.monotonic() - begun:.0f} s", flush=True)
        names = [name for name in names if not known[name].error]
        for outcome in apart.run([*command, "--jobs"], names, PATIENCE):
            tile = known[outcome.name]
            tile.error = outcome.error
            tile.seconds, tile.low, tile.high = (outcome.found.get(k, 0.0) for k in ("seconds", "low", "high"))
            write(found(), out)
            print(f"{tile.name}: {tile.error or f'{tile.seconds * 1e3:.3g} ms'}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: the table has what was measured")
    write(found(), out)
    print(table(found()))
    failed = sum(bool(t.error) for t in planned)
    measured = sum(bool(t.seconds) for t in planned)
    unmeasured = {(t.kernel, t.dim) for t in planned} - {*winners(planned)}
    print(f"{measured} of {len(planned)} tiles measured, {failed} failed, in {time.monotonic() - begun:.0f} s; "
          f"no tile of {len(unmeasured)} kernels")  # fmt: skip
    return 1 if unmeasured else 0


def main(argv: list[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tiles", description=head, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER / device_name(), metavar="DIR", help="where it is written")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=KERNELS, help="these kernels")
    parser.add_argument("--dims", nargs="+", type=int, choices=DIMS, default=DIMS, help="these head dimensions")
    parser.add_argument("--compile-for", type=float, default=60.0, metavar="SECONDS", help="side by side, at first")
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="these, in this process, a line of JSON each")
    parser.add_argument("--compile", nargs="+", metavar="NAME", help="the same, without timing them")
    arguments = parser.parse_args(argv)
    names = arguments.jobs or arguments.compile
    if names:
        every = {t.name: partial(job, t, time_it=bool(arguments.jobs)) for t in tiles()}
        return apart.work(every, names)
    planned = tiles(arguments.only, arguments.dims)
    whole = {*arguments.only} == {*KERNELS} and {*arguments.dims} == {*DIMS}
    if whole:
        arguments.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.tiles"]
    return search(planned, command, arguments.out if whole else None, arguments.compile_for)


if __name__ == "__main__":
    sys.exit(main())
