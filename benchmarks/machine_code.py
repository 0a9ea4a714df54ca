"""What compiled GPU kernels cost, read out of their machine code: a row of numbers for each."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

TENSOR_CORE = re.compile(r"\b(?:[HIQO]MMA|[HIQ]GMMA|UTC\w*MMA|v_s?mf(?:ma|mac)_\w+)\b")
# Instructions of global memory: LDG.E.128, LDGSTS.E.BYPASS.128 (to shared memory), global_load_dwordx4.
LOADS = re.compile(r"\b(?:LDG(?:STS)?((?:\.\w+)*)|(?:global|buffer|flat)_load_(\w+))")
STORES = re.compile(r"\b(?:STG((?:\.\w+)*)|(?:global|buffer|flat)_store_(\w+))")
TMA_LOADS = re.compile(r"\bUTMALDG")
BULK_STORES = re.compile(r"\bUTMASTG")  # of a tile at once
CALLS = re.compile(r"\b(?:CALL\.\w+|s_swappc_b64)\b")  # the slow paths of divisions and the like
DYNAMIC_SHARED = re.compile(r"6SharedILm(\d+)E")  # the argument Shared<…> (csrc/cuda/launch.h) in a mangled name
AMD_BYTES = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4, "short": 2,
             "ushort": 2, "sshort": 2, "b16": 2, "byte": 1, "ubyte": 1, "sbyte": 1}  # fmt: skip

RESERVED = 1024  # bytes of shared memory that a block takes beside its own; of sm_90 and later ptxas counts them
# Of a multiprocessor (of AMD a compute unit): threads, blocks, bytes of shared memory.
LIMITS = {
    "sm_80": (2048, 32, 164 * 1024),
    "sm_90a": (2048, 32, 228 * 1024),
    "sm_100": (2048, 32, 228 * 1024),
    "sm_120": (1536, 24, 100 * 1024),
    "gfx942": (2048, 32, 64 * 1024),
}

Row = dict[str, int]


def read_instructions(code: str) -> Row:
    """Of SASS or AMD's assembly: tensor-core instructions, loads by TMA, the bytes of the widest other load and of the
    widest store of global memory, the number of stores, and that of calls."""
    loads = [_width(*found) for found in LOADS.findall(code)]
    stores = [_width(*found) for found in STORES.findall(code)]
    return {
        "tensor_core": len(TENSOR_CORE.findall(code)),
        "tma": len(TMA_LOADS.findall(code)),
        "load": max(loads, default=0),
        "store": max(stores, default=0),
        "stores": len(stores) + len(BULK_STORES.findall(code)),
        "calls": len(CALLS.findall(code)),
    }


def _width(nvidia: str, amd: str) -> int:
    if amd:
        return next((n for name, n in AMD_BYTES.items() if amd.startswith(name)), 4)
    sizes = [int(bits) // 8 for bits in re.findall(r"\.[US]?(8|16|64|128|256)\b", nvidia)]
    return sizes[-1] if sizes else 4


def blocks(target: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor holds at once, by registers, shared memory and threads."""
    most_threads, most_blocks, memory = LIMITS[target]
    found = min(most_blocks, most_threads // threads)
    if target.startswith("gfx"):  # 512 registers a lane on each of four SIMDs, in steps of 8, for waves of 64
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(found, waves // -(-threads // 64), memory // max(1, shared))
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(found, by_registers, memory // (shared + RESERVED))


def read_amd(assembly: str, threads: int) -> Row:
    def number(field: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{field}:\s+(\d+)", assembly))

    registers, shared = number("vgpr_count"), number("group_segment_fixed_size")
    return {
        "registers": registers,
        "local": number("private_segment_fixed_size"),
        "shared": shared,
        **read_instructions(assembly),
        "blocks": blocks("gfx942", registers, shared, threads),
    }


def short_names(plain: Sequence[str]) -> list[str]:
    """Names without namespaces and, where it still tells them apart, without the shapes that tuning changes."""
    names = [re.sub(r"\(anonymous namespace\)::|fastllm::|cuda::|__nv_|\b(\w+)::(?=\1_)", "", name) for name in plain]
    names = [re.sub(r"\battention::|, Shared<\w+>", "", name).replace("> >", ">>") for name in names]
    without = [re.sub(r", \w+Shape<[^<>]*>", "", name) for name in names]
    return [short if without.count(short) == 1 else name for short, name in zip(without, names, strict=True)]


def read_cubin(
    path: Path, target: str, *, threads: int = 0, shared: int | None = None, one: bool = True
) -> dict[str, Row]:
    """Kernel -> row, for the machine code in a cubin, or (not ``one``) for one architecture in a shared library.

    ``threads`` of a block: 0 reads the most that a kernel says it takes; ``shared``: None reads what it declares, and
    adds what its name says.
    """
    choice = [] if one else ["-arch", target]
    usage = _cuobjdump("-res-usage", *choice, path)
    most = _most_threads(path, choice) if not threads else {}
    rows: dict[str, Row] = {}
    for function, fields in re.findall(r"Function (\S+):\n\s*(.*)", usage):
        value = dict(re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", fields))
        registers, local = int(value["REG"]), int(value["STACK"]) + int(value["LOCAL"])
        declared = max(0, int(value["SHARED"]) - (0 if target == "sm_80" else RESERVED))
        declared += sum(map(int, DYNAMIC_SHARED.findall(function)))
        rows[function] = {
            "registers": registers, "local": local, "shared": declared if shared is None else shared
        }  # fmt: skip
    for part in re.split(r"Function : ", _cuobjdump("-sass", *choice, path))[1:]:
        name = part.split(None, 1)[0]
        row = rows[name]
        row |= read_instructions(part)
        row["blocks"] = blocks(target, row["registers"], row["shared"], threads or most.get(name, 1024))
    return rows


def _most_threads(path: Path, choice: list[str]) -> dict[str, int]:
    """By kernel, what __launch_bounds__ says."""
    found: dict[str, int] = {}
    name = ""
    lines = iter(_cuobjdump("-elf", *choice, path).splitlines())
    for line in lines:
        if section := re.match(r"\.nv\.info\.(\S+)", line.strip()):
            name = section.group(1)
        elif "EIATTR_MAX_THREADS" in line and name:
            value = re.search(r"Value:\s*(.*)", line + " " + next(lines, "") + " " + next(lines, ""))
            sizes = [int(n, 16) for n in re.findall(r"0x[0-9a-f]+", value.group(1))[:3]] if value else []
            if sizes:
                found[name] = sizes[0] * (sizes[1] if len(sizes) > 1 else 1) * (sizes[2] if len(sizes) > 2 else 1)
    return found


def _cuobjdump(*arguments: object) -> str:
    """By the one that Triton's wheel carries."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
