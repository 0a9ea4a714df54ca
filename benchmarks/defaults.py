"""What is the default on each kind of GPU, backends and tiles: kernels/measured.py, from the committed results."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from fastllm.files import write_atomic
from fastllm.kernels import backends

from . import tiles
from .cases import OURS
from .record import FOLDER, Result, committed

FILE = Path(__file__).resolve().parent.parent / "kernels" / "measured.py"


def fastest(result: Result) -> dict[str, str]:
    """Op -> the backend whose times have the least geometric mean over the cases that all of its backends ran.

    Cases of forward and backward; of forward alone, where an op has no others.
    """
    logs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    trained = {row.op for row in result.rows if row.direction == "forward+backward"}
    for rows in result.by_case().values():
        if rows[0].op in trained and rows[0].direction == "forward":
            continue
        ours = {r.implementation.removeprefix(f"{OURS} "): r for r in rows if r.implementation.startswith(f"{OURS} ")}
        ours = {backend: r for backend, r in ours.items() if backend in backends.BACKENDS}
        if rows[0].op in backends.OPS and len(ours) > 1 and not any(r.error for r in ours.values()):
            for backend, row in ours.items():
                logs[row.op][backend].append(math.log(row.seconds))
    return {op: min(times, key=lambda b: sum(times[b]) / len(times[b])) for op, times in sorted(logs.items())}


def fastest_tiles() -> Iterator[tuple[str, str, int, tiles.TileSize]]:
    """Name of the GPU, kernel, head dimension and tile of every committed search."""
    for path in sorted(FOLDER.glob(f"*/{tiles.FILE}")):
        stamp, found = tiles.read(path)
        for (kernel, dim), tile in sorted(tiles.winners(found).items()):
            yield stamp["gpu"], kernel, dim, tile


def text() -> str:
    """The module's source."""
    backend_of = [
        f'    ("{op}", "{result.stamp["gpu"]}"): "{backend}",'
        for _, result in committed()
        if "gpu" in result.stamp
        for op, backend in fastest(result).items()
    ]
    tile_of = [f'    ("{gpu}", "{kernel}", {dim}, False): {tile},' for gpu, kernel, dim, tile in fastest_tiles()]
    lines = [
        '"""What was measured to be the fastest on a kind of GPU: backends of ops, tiles of attention kernels.',
        "",
        "Written by `python -m benchmarks --defaults` from benchmarks/results/.",
        '"""',
        "",
        "# (op, name of the GPU) -> backend",
        *_dictionary("MEASURED_FASTER: dict[tuple[str, str], str]", backend_of),
        "",
        "# (GPU, kernel, padded head dimension, window or softcap) -> (queries, keys, warps, stages, specialised)",
        *_dictionary("MEASURED_TILES: dict[tuple[str, str, int, bool], tuple[int, int, int, int, bool]]", tile_of),
    ]
    return "\n".join(lines) + "\n"


def _dictionary(name: str, entries: list[str]) -> list[str]:
    return [f"{name} = {{", *entries, "}"] if entries else [f"{name} = {{}}"]


def write() -> bool:
    """Whether anything changed."""
    new = text()
    changed = not FILE.exists() or FILE.read_text() != new
    if changed:
        write_atomic(FILE, new.encode())
    return changed
