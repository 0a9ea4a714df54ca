"""Builds the native module ``fastllm.kernels._C``: C++ always, CUDA C++ where nvcc is found, never torch.

Environment:
    FASTLLM_CUDA_ARCHS   architectures of the CUDA kernels, "80;90a", "all" or "none"
                         (default: those of this machine's GPUs; none where it has no GPU)
    FASTLLM_CPU_ISAS     instruction sets of the CPU kernels beside "base", "avx2;avx512", "base" for no other
                         (default: all of X86_ISAS, on x86)
    CUDA_HOME            where the CUDA toolkit is, if nvcc is not on the PATH
    CXX, CXXFLAGS        the C++ compiler ("ccache g++" too), and options added to it
    FASTLLM_NATIVE=0     build no native module, as where there is no compiler
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
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
ALL_ARCHS = ("80", "90a", "100", "120")
# Each csrc/cuda/attention_*.cu is compiled once for every one of these: element type, and head dimension padded to it.
ATTENTION = [(element, dim) for element in ("__half", "__nv_bfloat16") for dim in (256, 192, 128, 96, 64)]

# Each CPU source is compiled once for every one of these; the fastest that the processor has is called.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
X86_ISAS = {"base": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


def find_cxx() -> list[str] | None:
    """The command of the C++ compiler, or None where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if not shutil.which(named[0]):
            raise CompileError(f"CXX is {shlex.join(named)!r}, but there is no program {named[0]!r}")
        return named
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return [found] if found else None


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None) or shutil.which(
        "nvcc", path="/usr/local/cuda/bin"
    )
    return Path(found).resolve() if found else None


def cpu_isas() -> dict[str, list[str]]:
    """The instruction sets to compile for, with their options, the best last. "base" runs everywhere."""
    known = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"base": []}
    asked = os.environ.get("FASTLLM_CPU_ISAS", "").replace(",", ";").replace(" ", "")
    if not asked:
        return known
    wanted = {"base", *filter(None, asked.split(";"))}
    if not wanted <= {*X86_ISAS}:
        raise CompileError(f"FASTLLM_CPU_ISAS is {asked!r}; it takes {', '.join(X86_ISAS)}")
    return {isa: options for isa, options in known.items() if isa in wanted}


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


def from_ampere(archs: tuple[str, ...]) -> list[str]:
    """nvcc's options for sources of which compute capability 8.0 has all that they use: one compilation to PTX then
    serves every architecture, and the driver of newer GPUs. Where there is an older one, they trap."""
    newer = [a for a in archs if int(a.rstrip("abf")) >= 80]
    options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs if a not in newer]
    codes = ",".join([*(f"sm_{a}" for a in newer), "compute_80"])
    return [*options, f"-gencode=arch=compute_80,code=[{codes}]"]


class Ninja:
    """A build.ninja in the making: objects, then one link."""

    def __init__(self, compilers: dict[str, list[str]]) -> None:
        self.objects: list[Path] = []
        # -MMD: headers that change compile again what includes them
        self.lines = [
            f"rule {name}\n  command = {self.words(command)} $flags -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc"
            for name, command in compilers.items()
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

    def link(self, command: list[str], target: Path, flags: list[str]) -> None:
        self.lines += [
            f"rule link\n  command = {self.words(command)} $in {self.words(flags)} -o $out",
            f"build {self.escape(target)}: link {' '.join(map(self.escape, self.objects))}",
            f"default {self.escape(target)}",
        ]


class BuildNative(build_ext):
    """Writes a build.ninja and runs it. Where there is no compiler the package installs without the module."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # a stale one is worse than none
        if self.inplace or self.editable_mode:
            (ROOT / "kernels" / target.name).unlink(missing_ok=True)
        if not list(CSRC.glob("*.cpp")) or not list((CSRC / "cpu").glob("*.cpp")):
            raise CompileError(f"there are no C++ sources in {CSRC}: this copy of fastllm is incomplete")
        cxx = find_cxx()
        if os.environ.get("FASTLLM_NATIVE") == "0":
            self._warn("not wanted (FASTLLM_NATIVE=0)")
        elif not cxx:
            self._warn("no C++ compiler found. Install g++ or clang++, or set CXX to name one, and install again")
        else:
            self._build(target, cxx)

    @staticmethod
    def _warn(reason: str) -> None:
        lines = (
            f"WARNING: fastllm was installed WITHOUT its native module: {reason}.",
            "On a CPU every op now runs as plain PyTorch, which is slower and takes more memory.",
            "The Triton kernels work without it. `fastllm info` shows what an install has.",
        )
        rule = "*" * max(map(len, lines))
        print("", rule, *lines, rule, "", sep="\n", file=sys.stderr)

    def _build(self, target: Path, cxx: list[str]) -> None:
        import pybind11

        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        nvcc = find_nvcc() if platform.system() == "Linux" else None
        archs = cuda_archs() if nvcc else ()
        isas = cpu_isas()
        openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]

        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *openmp]
        # GCC 12 says "uninitialized" of its own AVX-512 header; clang does not know one of the two
        flags += [f"-W{w}" for w in ("all", "extra", "no-unknown-warning-option", "no-uninitialized")]
        flags += ["-Wno-maybe-uninitialized"]
        flags += [f"-I{d}" for d in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
        flags += ["-DFASTLLM_MODULE_NAME=_C", *extra]

        work = Path(self.build_temp).resolve()
        ninja = Ninja({"cxx": cxx} | ({"nvcc": [str(nvcc)]} if archs else {}))
        each = f"-DFASTLLM_EACH_ISA(f)={' '.join(f'f({isa})' for isa in isas)}"
        with_cuda = ["-DFASTLLM_CUDA", f'-DFASTLLM_CUDA_ARCHS="{" ".join(archs)}"'] if archs else []
        for source in sorted(CSRC.glob("*.cpp")):
            ninja.compile("cxx", source, work / f"{source.stem}.o", [*flags, each, *with_cuda])
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
                f"-ccbin={cxx[-1]}",
                f"-I{CSRC}",
            ]
            newest = max((a for a in archs if a.isdigit()), key=int, default=None)
            ptx = [newest] if newest else []  # for GPUs that are newer still, the driver compiles it
            every = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            every += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ptx]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                if not source.stem.startswith("attention_"):
                    ninja.compile("nvcc", source, work / f"cuda_{source.stem}.o", [*options, *every])
                    continue
                for element, dim in ATTENTION:
                    out = work / f"cuda_{source.stem}_{element.strip('_')}_{dim}.o"
                    one = [f"-DFASTLLM_ELEMENT={element}", f"-DFASTLLM_DIM={dim}"]
                    ninja.compile("nvcc", source, out, [*options, *from_ampere(archs), *one])
            # nvcc links: it knows where its static CUDA runtime is, which needs no driver to load.
            ninja.link(
                [str(nvcc)], target, ["-shared", f"-ccbin={cxx[-1]}", "-Xcompiler=-fopenmp", "-Xlinker=--gc-sections"]
            )
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
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(work)]).returncode:
            raise CompileError(
                f"the native module could not be compiled (by {shlex.join(cxx)}); the compiler's message is above, "
                "after FAILED. CXX names another compiler; FASTLLM_NATIVE=0 installs without native kernels"
            )


setup(
    ext_modules=[Extension("fastllm.kernels._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
