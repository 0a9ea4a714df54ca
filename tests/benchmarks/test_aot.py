"""The committed table of what the compilers made of the GPU kernels (test_repository.py compiles and compares)."""

from __future__ import annotations

import json

import pytest

from benchmarks.aot import SHARED, TABLE
from benchmarks.machine_code import LIMITS, RESERVED

ARCHS = {target for target in SHARED if target.startswith("sm_")}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["__half", "bfloat16"])
def test_attention_multiplies_on_tensor_cores_and_keeps_its_sums_in_registers(dtype, dim):
    (table,) = json.loads(TABLE.read_text())["cuda"].values()
    for kernel in ("forward", "dkdv", "dq", "decode"):
        rows = table[f"attention_{kernel}_kernel<{dtype}, {dim}>"]
        assert rows.keys() == ARCHS
        for arch, row in rows.items():
            assert row["tensor_core"] > 0 and row["local"] == 0, (kernel, arch, row)
            assert row["shared"] > 0, "the table knows nothing of dynamic shared memory"
            assert row["blocks"] <= LIMITS[arch][2] // (row["shared"] + RESERVED)
            if kernel == "forward":  # csrc/cuda/attention_forward.cu: two fit even 100 KiB
                assert row["blocks"] >= 2, (arch, row)


def test_warps_specialise():
    """Triton says nothing where they don't: a kernel has then no loads by TMA, and 255 registers for each thread."""
    rows = {
        kernel: row
        for table in json.loads(TABLE.read_text())["triton"].values()
        for kernel, by_target in table.items()
        if "specialized" in kernel
        for row in by_target.values()
    }
    assert {kernel.rpartition("_")[2] for kernel in rows} == {"forward", "dkdv", "dq"}
    for kernel, row in rows.items():
        assert row["tma"] >= 4 and row["tensor_core"] >= 18 and row["local"] == 0 and row["store"] == 16, (kernel, row)
        assert row["registers"] == 168 and row["blocks"] >= 1  # at launch, of 12 warps; then 40 and 232
