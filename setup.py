"""Builds the native module ``fastllm.kernels._C``: C++ always, CUDA C++ where nvcc is found, never torch.

Environment:
    FASTLLM_CUDA_ARCHS   architectures of the CUDA kernels, "80;90a", "all" or "none"
                         (default: those of this machine's GPUs; none where it has no GPU)
    CUDA_HOME            where the CUDA toolkit is, if nvcc is not on the PATH
    CXX, CXXFLAGS        the C++ compiler, and options added to it
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
ALL_ARCHS = ("80", "90a", "100", "120")

# Each CPU source is compiled once for every one of these; the fastest that the processor has is called.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
X86_ISAS = {"base": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None) or shutil.which(
        "nvcc", path="/usr/local/cuda/bin"
    )
    return Path(found).resolve() if found else None


def cuda_archs() -> tuple[str, ...]:
    """Nobody should wait for kernels that the machine can't run: a build for another machine names them."""
    asked = os.environ.get("FASTLLM_CUDA_ARCHS", "").replace(",", ";").strip()
    if asked in ("all", "none"):
        return ALL_ARCHS if asked == "all" else ()
    if asked:
        return tuple(arch.strip() for arch in asked.split(";") if arch.strip())
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ()
    archs = {capability.replace(".", "") for capability in found if capability[:1].isdigit()}
    return tuple(sorted(arch + "a" if arch == "90" else arch for arch in archs))


class Ninja:
    """A build.ninja in the making: objects, then one link."""

    def __init__(self, compilers: dict[str, str | Path]) -> None:
        self.objects: list[Path] = []
        # -MMD: headers that change compile again what includes them
        self.lines = [
            f"rule {name}\n  command = {self.escape(program)} $flags -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc"
            for name, program in compilers.items()
        ]

    @staticmethod
    def escape(word: str | Path) -> str:
        return str(word).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    @staticmethod
    def words(flags: list[str]) -> str:
        return shlex.join(flags).replace("$", "$$")

    def compile(self, compiler: str, source: Path, out: Path, flags: list[str]) -> None:
        self.objects.append(out)
        self.lines.append(f"build {self.escape(out)}: {compiler} {self.escape(source)}\n  flags = {self.words(flags)}")

    def link(self, program: str | Path, target: Path, flags: list[str]) -> None:
        self.lines += [
            f"rule link\n  command = {self.escape(program)} $in {self.words(flags)} -o $out",
            f"build {self.escape(target)}: link {' '.join(map(self.escape, self.objects))}",
            f"default {self.escape(target)}",
        ]


class BuildNative(build_ext):
    """Writes a build.ninja and runs it. Where there is no compiler the package installs without the module."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(target)
        except Exception as error:
            stale = [target, *(ROOT / "kernels").glob("_C.*.so")] if self.inplace or self.editable_mode else [target]
            for module in stale:  # worse than none
                module.unlink(missing_ok=True)
            print(
                f"\nfastllm: the native module was NOT built: {error}\n"
                "fastllm: the Triton and PyTorch backends work without it; the CPU and CUDA C++ kernels don't.\n",
                file=sys.stderr,
            )

    def _build(self, target: Path) -> None:
        import pybind11

        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if not cxx:
            raise RuntimeError("no C++ compiler found (g++ or clang++; set CXX to name one)")
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        nvcc = find_nvcc() if platform.system() == "Linux" else None
        archs = cuda_archs() if nvcc else ()
        isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"base": []}
        openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]

        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *openmp]
        flags += [
            "-Wall",
            "-Wextra",
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
        ]  # GCC 12 says that of its own AVX-512 header
        flags += [f"-I{d}" for d in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
        flags += ["-DFASTLLM_MODULE_NAME=_C", *extra]

        work = Path(self.build_temp).resolve()
        ninja = Ninja({"cxx": cxx} | ({"nvcc": nvcc} if archs else {}))
        with_cuda = ["-DFASTLLM_CUDA", f'-DFASTLLM_CUDA_ARCHS="{" ".join(archs)}"'] if archs else []
        for source in sorted(CSRC.glob("*.cpp")):
            ninja.compile("cxx", source, work / f"{source.stem}.o", [*flags, *with_cuda])
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            for isa, options in isas.items():
                out = work / f"cpu_{source.stem}_{isa}.o"
                ninja.compile("cxx", source, out, [*flags, *options, f"-DFASTLLM_ISA={isa}"])
        if archs:
            options = [
                "-std=c++17",
                "-O3",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "--threads=0",
                f"-ccbin={cxx}",
                f"-I{CSRC}",
            ]
            options += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            newest = max((a for a in archs if a.isdigit()), key=int, default=None)
            if newest:  # for GPUs that are newer still, the driver compiles PTX
                options += [f"-gencode=arch=compute_{newest},code=compute_{newest}"]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                ninja.compile("nvcc", source, work / f"cuda_{source.stem}.o", options)
            # nvcc links: it knows where its static CUDA runtime is, which needs no driver to load.
            ninja.link(nvcc, target, ["-shared", f"-ccbin={cxx}", "-Xcompiler=-fopenmp", "-Xlinker=--gc-sections"])
        elif platform.system() == "Darwin":
            ninja.link(cxx, target, ["-shared", "-undefined", "dynamic_lookup", *extra])
        else:
            ninja.link(cxx, target, ["-shared", *openmp, "-Wl,--gc-sections", *extra])

        for folder in (work, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
        cuda = f"CUDA C++ for {', '.join(archs)}" if archs else "no CUDA C++: nvcc not found"
        if nvcc and not archs:
            cuda = "no CUDA C++: no GPU here, or not wanted (FASTLLM_CUDA_ARCHS=all builds it for other machines)"
        print(f"fastllm: building the native module: C++ for {', '.join(isas)}; {cuda}")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(work)], check=True)


setup(
    ext_modules=[Extension("fastllm.kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
