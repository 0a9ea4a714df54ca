"""Builds the native module ``fastllm.kernels._C``: C++ always, CUDA C++ where nvcc is found, never torch.

Environment:
    FASTLLM_CUDA_ARCHS   architectures of the CUDA kernels, "80;90a" (default: those of the GPUs present,
                         else 80, 90a, 100 and 120); "none" leaves them out
    CUDA_HOME            where the CUDA toolkit is, if nvcc is not on the PATH
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = ("80", "90a", "100", "120")

# Each CPU source is compiled once for every one of these; the fastest that the processor has is called.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_ISAS = {"base": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None) or shutil.which(
        "nvcc", path="/usr/local/cuda/bin"
    )
    return Path(found).resolve() if found else None


def cuda_archs() -> tuple[str, ...]:
    asked = os.environ.get("FASTLLM_CUDA_ARCHS", "").replace(",", ";").strip()
    if asked:
        return () if asked == "none" else tuple(a.strip() for a in asked.split(";") if a.strip())
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        caps = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return DEFAULT_ARCHS
    archs = {cap.replace(".", "") for cap in caps if cap[:1].isdigit()}
    return tuple(sorted(a + "a" if a == "90" else a for a in archs)) or DEFAULT_ARCHS


def ninja_escape(word: str | Path) -> str:
    return str(word).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell_words(words: list[str]) -> str:
    return " ".join("'" + w.replace("'", "'\\''") + "'" if set(w) & set(" ;()&|<>'\"") else w for w in words)


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
        nvcc = find_nvcc() if platform.system() == "Linux" else None
        archs = cuda_archs() if nvcc else ()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        flags = [
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-maybe-uninitialized",
            "-g0",
            *includes,
        ]
        link = ["-shared"]
        if platform.system() == "Darwin":
            link += ["-undefined", "dynamic_lookup"]
        else:
            flags += ["-fopenmp"]
            link += ["-fopenmp", "-Wl,--gc-sections"]
        flags += ["-DFASTLLM_MODULE_NAME=_C"]
        if archs:
            flags += ["-DFASTLLM_CUDA", f'-DFASTLLM_CUDA_ARCHS="{" ".join(archs)}"']
        isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"base": []}

        lines = [
            f"cxx = {ninja_escape(cxx)}",
            "rule cxx\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {ninja_escape(nvcc if archs else cxx)} $in $flags -o $out",
        ]
        objects: list[Path] = []

        def compile_to(name: str, rule: str, source: Path, words: list[str]) -> None:
            out = work / f"{name}.o"
            objects.append(out)
            lines.append(f"build {ninja_escape(out)}: {rule} {ninja_escape(source)}\n  flags = {ninja_flags(words)}")

        def ninja_flags(words: list[str]) -> str:
            return shell_words(words).replace("$", "$$")

        for source in sorted(CSRC.glob("*.cpp")):
            compile_to(source.stem, "cxx", source, flags)
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            for isa, options in isas.items():
                compile_to(f"cpu_{source.stem}_{isa}", "cxx", source, [*flags, *options, f"-DFASTLLM_ISA={isa}"])
        if archs:
            lines += [
                f"nvcc = {ninja_escape(nvcc)}",
                "rule nvcc\n  command = $nvcc $flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            ]
            gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            newest = max((a for a in archs if a.isdigit()), key=int, default=None)
            if newest:  # for GPUs that are newer still, the driver compiles PTX
                gencode.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
            options = [
                "-std=c++17",
                "-O3",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "--threads=0",
                f"-I{CSRC}",
                f"-ccbin={cxx}",
            ]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                compile_to(f"cuda_{source.stem}", "nvcc", source, [*options, *gencode])
            # nvcc links: it knows where its static CUDA runtime is, which needs no driver to load.
            link = ["-shared", f"-ccbin={cxx}", "-Xcompiler=-fopenmp", "-Xlinker=--gc-sections"]

        lines.append(
            f"build {ninja_escape(target)}: link {' '.join(map(ninja_escape, objects))}\n  flags = {ninja_flags(link)}"
        )
        lines.append(f"default {ninja_escape(target)}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        cuda = f"CUDA C++ for {', '.join(archs)}" if archs else "no CUDA C++ (nvcc not found or not wanted)"
        print(f"fastllm: building the native module: C++ for {', '.join(isas)}; {cuda}")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(work)], check=True)


setup(ext_modules=[Extension("fastllm.kernels._C", sources=[], optional=True)], cmdclass={"build_ext": BuildNative})
