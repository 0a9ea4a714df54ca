"""How often Triton compiles the kernels, on a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ODD = "attention, head_dim 75, whose rows are no multiples of 16 bytes"
# One variant of each kernel for a group of calls that differ in sizes and strides alone, but for these.
MORE = {
    # where q, k and v of one projection begin
    (ODD, "forward_kernel"): 4,
    (ODD, "dkdv_kernel"): 4,
    (ODD, "dq_kernel"): 4,
    # split over programs or not; few parts or many
    ("decode", "decode_kernel"): 2,
    ("decode", "combine_kernel"): 2,
}


def test_sizes_and_strides_compile_nothing_again():
    code = "import json; from benchmarks.variants import variants; print(json.dumps(variants()))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    launched = {kernel for kernels in found.values() for kernel in kernels}
    assert launched >= {
        "forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel", "decode_kernel", "combine_kernel",
        "backward_kernel", "softmax_forward_kernel", "softmax_backward_kernel", "cross_entropy_forward_kernel",
        "cross_entropy_backward_kernel", "rotate_kernel",
    }  # fmt: skip
    compiled = {(group, kernel): n for group, kernels in found.items() for kernel, (n, _) in kernels.items()}
    assert compiled == {place: MORE.get(place, 1) for place in compiled}
    assert all(launches > n for kernels in found.values() for n, launches in kernels.values())
