"""``fastllm info``: what this install has, what it lacks and how to get it, on one screen, for a bug report.

It works with only part of what it asks for: no GPU, no native module, no Triton, even no PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import textwrap
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__
from .errors import DISTRIBUTION, pip_install

# Extras of pyproject.toml, the packages that each asks for beyond the others, and what asks for them.
EXTRAS = {
    "train": ("matplotlib", "numpy", "rich", "safetensors", "tokenizers", "tyro", "zstandard"),
    "data": ("fastwarc", "mwparserfromhell", "mwxml", "py3langid", "pyarrow", "rensa", "resiliparse"),
    "gguf": ("gguf",),
    "serve": ("jinja2", "llguidance", "prometheus_client", "starlette", "uvicorn"),
    "tune": ("jinja2", "peft"),
    "hf": ("transformers",),
    "tensorboard": ("tensorboard",),
}
USED_BY = {
    "train": "fastllm train, generate, chat, export, plan and bench",
    "data": "fastllm data prepare of crawls, dumps, books and Parquet",
    "gguf": "GGUF files",
    "serve": "fastllm serve, and answers of a given form",
    "tune": "fastllm sft and align: chat templates and adapters",
    "hf": "fastllm.patch",
    "tensorboard": "--train.tensorboard",
}
PACKAGES = ("numpy", "safetensors", "tokenizers", "transformers", "accelerate", "peft")
# Of /proc/cpuinfo: those that our kernels or PyTorch's choose by, x86 and Arm.
FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve",
)  # fmt: skip
VARIABLES = ("FASTLLM_", "TRITON_INTERPRET", "OMP_", "MKL_", "ONEDNN_", "DNNL_", "CUDA_VISIBLE_DEVICES", "ATEN_")
WIDTH, INDENT = 100, 13


def info() -> str:
    """The whole report."""
    return "\n".join(_line(label, text) for label, text in _rows())


def _line(label: str, text: str) -> str:
    lines = textwrap.wrap(text, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
    return f"{label:<{INDENT}}" + f"\n{'':<{INDENT}}".join(lines)


def _rows() -> Iterator[tuple[str, str]]:
    """(label, text) of each line, top to bottom."""
    yield "fastllm", f"{__version__} in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()} in {sys.prefix}; {platform.platform()}"
    cpu, features = _processor()
    yield "processor", cpu
    if features:
        yield "", " ".join(features)
    missing = []
    try:
        import torch
    except Exception as error:  # whatever a broken install raises: the report says it
        yield "torch", f"can't be imported: {type(error).__name__}: {error}"
        missing.append("torch: pip install torch (https://pytorch.org/get-started has the builds for each GPU)")
    else:
        yield (
            "torch",
            f"{torch.__version__}, {torch.get_num_threads()} threads; triton {_version('triton') or 'missing'}",
        )
        gpus, device = _gpus(torch)
        for number, gpu in enumerate(gpus):
            yield "" if number else "GPU", gpu
        try:
            from .kernels import backends, native
        except Exception as error:
            yield "kernels", f"can't be imported: {type(error).__name__}: {error}"
        else:
            yield from _backends(backends, native, device)
            missing += [why for why in (native.cpu_missing(), backends.TRITON_MISSING) if why]
    found = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    yield "packages", ", ".join(found) or "none of " + ", ".join(PACKAGES)
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)]
    yield "environment", " ".join(settings) or "nothing set"
    missing += _missing_extras()
    if other := _version("fastllm"):
        missing.append(
            f"its own folder: another distribution, fastllm {other}, writes to the same one; "
            f"pip uninstall fastllm, then pip install --force-reinstall --no-deps {DISTRIBUTION}"
        )
    for number, what in enumerate(missing or ["nothing"]):
        yield "" if number else "missing", what


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, list[str]]:
    """The processor in a line, and those of its features that matter here, where the system tells them."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:  # not Linux
        lines = []
    told = {key.strip(): value.strip() for key, _, value in lines}
    flags = (told.get("flags") or told.get("Features") or "").split()
    name = told.get("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    return f"{name}, {cores} cores, {memory:.0f} GiB", [f for f in FEATURES if f in flags]


def _gpus(torch: Any) -> tuple[list[str], Any]:
    """A line for each GPU, or one that says why there is none; and the device that the kernels would serve."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    with warnings.catch_warnings(record=True) as caught:  # of a driver that is too old, for one
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if there:
        lines = []
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            lines.append(f"{number}: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}; {build}")
        return lines, torch.device("cuda", 0)
    if not torch.version.cuda and not torch.version.hip:
        why = "this PyTorch is a build for CPUs"
    else:
        why = f"this PyTorch ({build}) finds none" + "".join(f"; {w.message}" for w in caught)
    return [f"none: {why}"], torch.device("cpu")


def _backends(backends: Any, native: Any, device: Any) -> Iterator[tuple[str, str]]:
    """A line for each backend: whether it runs here, and why not."""
    cpu = native.cpu_missing()
    if cpu is None:
        try:
            kernels = native.KERNELS["cpu"]
            cpu = f"yes, with {kernels.instruction_set()} instructions (of {', '.join(kernels.instruction_sets())})"
        except ValueError as error:  # FASTLLM_CPU_ISA names what it can't run
            cpu = f"no: {error}"
    else:
        cpu = "no: the native module is missing, see below"
    gpu = device.type != "cpu"
    cuda = native.cuda_missing(device) if gpu else "there is no GPU"
    triton = "see below" if backends.TRITON_MISSING else backends.device_limit("triton", device)
    if triton and not gpu and not backends.TRITON_MISSING:
        triton = "there is no GPU (TRITON_INTERPRET=1 runs its interpreter)"
    yield "backends", f"cpu     {cpu}"
    yield "", f"triton  {f'no: {triton}' if triton else 'yes' if gpu else 'on request, in its interpreter'}"
    yield "", f"cuda    {f'no: {cuda}' if cuda else 'yes, compiled for ' + native.KERNELS['cuda'].archs}"
    yield "", "torch   yes"


def _missing_extras() -> Iterator[str]:
    for extra, packages in EXTRAS.items():
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        if absent:
            yield f"{', '.join(absent)} (for {USED_BY[extra]}): {pip_install(extra)}"
