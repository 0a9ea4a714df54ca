"""Compiles CUDA sources with g++ and the emulator's headers into a library that runs them on the CPU."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SIMT = Path(__file__).resolve().parent
REPOSITORY = SIMT.parent.parent
CACHE = REPOSITORY / "build" / "simt"

# Kernels view their registers as other types; NaN and infinity must behave as they do on the GPU, and
# products are not fused into sums unless the source says so. An access that is not aligned calls simt.cpp. Each
# variable has a section of its own, of which SHARED gathers some.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing",
         "-ffp-contract=off", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-fsanitize=alignment",
         "-fdata-sections"]  # fmt: skip

SHARED = SIMT / "shared.ld"
OWN_FLAGS = ["-O3"]  # for the emulator's sources, which every operation runs


def build(
    sources: Sequence[Path],
    name: str,
    *,
    flags: Sequence[str] = (),
    include: Sequence[Path] = (),
    python_module: bool = False,
) -> Path:
    """Compile ``sources`` (.cpp, .cu) and the emulator into a shared library and return its path.

    A library that was built before from the same text is taken from the cache. With ``python_module`` it
    is an extension module called ``name``, compiled with the headers of Python and pybind11.
    """
    include = [SIMT, *include]
    suffix = ".so"
    if python_module:
        import pybind11

        include += [Path(sysconfig.get_path("include")), Path(pybind11.get_include())]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, *FLAGS, *flags, *(f"-I{path}" for path in include)]
    own = sorted(SIMT.glob("*.cpp"))
    sources = [*map(Path, sources), *own]

    target = CACHE / f"{name}-{_key([*command, *OWN_FLAGS], sources, include)}" / f"{name}{suffix}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of pytest-xdist's workers builds, the others wait
        if target.exists():
            return target
        objects = [Path(folder, f"{number}.o") for number in range(len(sources))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # the largest first: the time is that of the last to end
            jobs = sorted(zip(sources, objects, strict=True), key=lambda job: -job[0].stat().st_size)

            def compile(job: tuple[Path, Path]) -> None:
                own_flags = OWN_FLAGS if job[0] in own else []
                _run([*command, *own_flags, "-x", "c++", "-c", job[0], "-o", job[1]])

            list(pool.map(compile, jobs))
        library = Path(folder, target.name)
        _run([*compiler, *flags, "-shared", *objects, f"-Wl,-T,{SHARED}", "-ldl", "-o", library])
        os.replace(library, target)  # whole or not at all
    return target


def _key(command: Sequence[str], sources: Sequence[Path], include: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    folders = {REPOSITORY / "csrc", *(path for path in include if path.is_relative_to(REPOSITORY))}
    headers = {path.resolve() for folder in folders for path in folder.rglob("*.h")}
    for part in (version, "\0".join(command).encode(), *map(_content, [*sources, SHARED, *sorted(headers)])):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _content(path: Path) -> bytes:
    return bytes(path) + b"\0" + path.read_bytes()


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr}")
