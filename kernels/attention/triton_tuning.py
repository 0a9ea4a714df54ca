"""Tile sizes of the attention kernels: what was measured on this kind of GPU, else a table, and a search on request.

``FASTLLM_AUTOTUNE=1`` times a short list at the first call of each class of shapes and keeps the winner in
``$FASTLLM_CACHE_DIR`` (``~/.cache/fastllm``) for this GPU, Triton and kernel source.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ..measured import MEASURED_TILES
from ..triton_launch import power_of_two
from .options import Options
from .triton_tiles import padded

# Read once: a launch costs microseconds.
AUTOTUNE = os.environ.get("FASTLLM_AUTOTUNE") == "1"


class Config(NamedTuple):
    """Queries and keys of a tile, warps, the stages of Triton's software pipeline, and whether warps specialise."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    specialized: bool = False


# By head dimension, for two-byte types: nothing here spills (benchmarks/aot.py).
_HALF = {
    "sm_80": {
        "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "forward with more": {64: (64, 64, 4, 2), 128: (128, 32, 8, 3)},
        "dkdv": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 2)},
        "dkdv with more": {64: (32, 64, 4, 2)},
        "dq": {64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
        "decode": {64: (64, 64, 8, 3), 128: (64, 64, 8, 3), 256: (32, 32, 4, 2)},
        "paged": {64: (16, 64, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 8, 2)},
    },
    "sm_90": {
        "forward": {64: (128, 128, 8, 3), 128: (128, 128, 8, 3), 256: (128, 32, 8, 3)},
        "forward with more": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3)},
        "dkdv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 3), 256: (32, 32, 8, 2)},
        "dkdv with more": {128: (32, 128, 8, 2)},
        "dq": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dq with more": {128: (128, 64, 8, 3)},
        "decode": {64: (64, 128, 8, 3), 128: (64, 64, 8, 3), 256: (32, 64, 4, 3)},
        "paged": {64: (16, 64, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)},
    },
    "sm_100": {
        "forward": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
        "dkdv": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
        "dq": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "decode": {64: (64, 128, 8, 3), 128: (64, 64, 8, 3), 256: (32, 64, 4, 3)},
        "paged": {64: (16, 64, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)},
    },
    "gfx942": {
        "forward": {64: (128, 64, 4, 1), 128: (128, 64, 8, 1), 256: (64, 32, 8, 1)},
        "forward with more": {64: (64, 64, 4, 1), 128: (64, 64, 8, 1)},
        "dkdv": {64: (32, 64, 4, 1), 128: (32, 64, 8, 1), 256: (16, 32, 8, 1)},
        "dkdv with more": {128: (16, 64, 8, 1)},
        "dq": {64: (64, 32, 4, 1), 128: (64, 32, 8, 1), 256: (32, 16, 8, 1)},
        "decode": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (32, 32, 4, 1)},
        "paged": {64: (16, 64, 4, 1), 128: (16, 64, 4, 1), 256: (16, 32, 4, 1)},
        "decode with more": {128: (64, 32, 4, 1)},
    },
}
# float32 has no tensor cores: small tiles.
_FLOAT = {
    "forward": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    "dkdv": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)},
    "dq": {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    "decode": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 8, 1)},
    "paged": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 32, 8, 1)},
}
_INTERPRETER = (64, 32, 4, 1)
# The warp-specialised kernels for two-byte types on sm_90; nothing here spills. No default before it is measured to be
# faster (measured.py); a search tries them.
_SPECIALIZED: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "forward": {
        64: ((128, 128, 4, 2), (128, 128, 4, 3), (128, 64, 4, 3)),
        128: ((128, 128, 4, 2), (128, 64, 4, 3)),
        256: ((128, 64, 4, 2), (128, 32, 4, 3)),
    },
    "forward with softcap": {128: ((128, 64, 4, 3),)},
    "dkdv": {64: ((64, 128, 4, 2), (64, 128, 4, 3)), 128: ((64, 128, 4, 2),)},
    "dkdv with softcap": {128: ()},
    "dq": {64: ((128, 64, 4, 2), (128, 64, 4, 3)), 128: ((128, 64, 4, 2), (128, 64, 4, 3))},
}


@functools.cache
def architecture(device: torch.device) -> str:
    """The names are those of compilers: sm_90, gfx942; the CPU is Triton's interpreter."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def gpu_name(device: torch.device) -> str:
    """As measured.py has it; of what is no GPU nothing."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def default(kernel: str, target: str, dim: int, itemsize: int, more: bool, gpu: str = "") -> Config:
    """The configuration for the padded head dimension ``dim``; ``more``: a window or softcap, which take registers.

    That which was measured to be the fastest on the kind of GPU named ``gpu`` (of two-byte types), else the table's.
    """
    if target == "cpu":
        return Config(*_INTERPRETER)
    measured = MEASURED_TILES.get((gpu, kernel, max(64, dim), more)) if itemsize == 2 else None
    return _listed(kernel, target, dim, itemsize, more) if measured is None else Config(*measured)


@functools.cache
def _listed(kernel: str, target: str, dim: int, itemsize: int, more: bool) -> Config:
    table = _FLOAT if itemsize == 4 else _HALF[_family(target)]
    tiles = table[kernel] | (table.get(f"{kernel} with more", {}) if more else {})
    return Config(*tiles[max(64, dim)])


def _family(target: str) -> str:
    if target.startswith("gfx"):
        return "gfx942"
    # sm_12x has the shared memory of sm_80 (99 KiB), and mma.sync.
    return next((known for known in ("sm_90", "sm_100") if target.startswith(known[:-1])), "sm_80")


def launch(
    kernel: str,
    q: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    shape: tuple[int, ...],
    call: Callable[[Config], None],
    outputs: Sequence[torch.Tensor | None],
    can_specialize: Callable[[], bool] = bool,
) -> None:
    """Launches with the default configuration or, where the user asked for a search, with the fastest for ``shape``.

    ``outputs``: what ``call`` writes. ``can_specialize``: whether the warp-specialised kernel, if there is one, takes
    this call.
    """
    target, dim = architecture(q.device), padded(max(q.shape[-1], v.shape[-1]))
    more = options.windowed or options.softcap > 0
    config = default(kernel, target, dim, q.element_size(), more, gpu_name(q.device))
    if config.specialized and not can_specialize():
        config = _listed(kernel, target, dim, q.element_size(), more)
    if AUTOTUNE and target != "cpu":
        special = specialized(kernel, target, dim, options.softcap > 0) if can_specialize() else ()
        key = f"{kernel} {q.dtype} {dim} {more} {bool(special)} {_shape_class(*shape)}"
        config = _tuned(key, q.device, config, call, outputs, special)
    call(config)


@functools.cache
def specialized(kernel: str, target: str, dim: int, softcap: bool) -> tuple[Config, ...]:
    """The configurations of the warp-specialised kernel there; none where there is none."""
    tiles = _SPECIALIZED.get(kernel, {}) | (_SPECIALIZED.get(f"{kernel} with softcap", {}) if softcap else {})
    return tuple(Config(*t, True) for t in tiles.get(max(64, dim), ()) if target.startswith("sm_90"))


def _shape_class(*sizes: int) -> str:
    """Shapes that share a tuned configuration: sizes to the next power of two."""
    return " ".join(str(power_of_two(n)) for n in sizes)


def _tuned(
    key: str,
    device: torch.device,
    config: Config,
    call: Callable[[Config], None],
    outputs: Sequence[torch.Tensor | None],
    special: tuple[Config, ...] = (),
) -> Config:
    """The fastest of those that compute what the first of them does, the default."""
    path = _cache(torch.cuda.get_device_name(device))
    known = _winners(path)
    if key in known or torch.cuda.is_current_stream_capturing():
        return known.get(key, config)
    times = []
    expected: list[torch.Tensor] | None = None
    for candidate in dict.fromkeys((*_candidates(config), *special)):
        try:
            call(candidate)
            written = [x for x in outputs if x is not None]
            expected = expected or [x.clone() for x in written]
            if all(map(_agree, written, expected)):
                times.append((triton.testing.do_bench(lambda c=candidate: call(c)), candidate))
            else:
                warnings.warn(f"attention, {key}: {candidate} gives another result and is left out", stacklevel=2)
        except Exception:  # more shared memory or registers than there are, or any pass of the compiler that gave up
            continue
    known[key] = min(times, key=lambda t: t[0])[1] if times else config
    _write(path, known)
    return known[key]


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for rounding, a third of this in bfloat16. An lse may be -inf."""
    finite = expected.isfinite()
    found, expected = (x.float().where(finite, 0) for x in (found, expected))
    return bool((found - expected).norm() <= 0.01 * expected.norm())


def _candidates(config: Config) -> list[Config]:
    """The default, and each with one thing changed."""
    m, n, warps, stages, is_specialized = config
    if is_specialized:  # nothing but its own list is known to compile
        return [config]
    tiles = [(m, n), (m // 2, n), (m * 2, n), (m, n // 2), (m, n * 2)]
    found = [Config(*t, warps, stages) for t in tiles if min(t) >= 16]
    return [*found, *(Config(m, n, w, s) for w, s in ((warps, stages + 1), (4, stages), (8, stages)) if w and s)]


@functools.cache
def _cache(gpu: str) -> Path:
    folder = Path(__file__).parent
    sources = *sorted(folder.glob("triton_*.py")), folder.parent / "triton_launch.py"
    source = b"".join(path.read_bytes() for path in sources)
    digest = hashlib.sha256(f"{gpu} {triton.__version__}".encode() + source).hexdigest()[:16]
    root = os.environ.get("FASTLLM_CACHE_DIR") or Path.home() / ".cache" / "fastllm"
    return Path(root) / f"attention-{digest}.json"


@functools.cache
def _winners(path: Path) -> dict[str, Config]:
    try:
        found = json.loads(path.read_text())
        return {k: Config(*(int(n) for n in v[:4]), bool(v[4])) for k, v in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, IndexError):
        return {}


def _write(path: Path, winners: dict[str, Config]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(winners, file)
        os.replace(file.name, path)
    except OSError:
        pass  # the winner is kept in memory
