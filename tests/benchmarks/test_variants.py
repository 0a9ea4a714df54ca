"""How often Triton compiles the kernels, on a GPU that is not there."""

from __future__ import annotations

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
    # a sequence in one part, or in several that are joined
    ("decode in pages", "paged_kernel"): 2,
}


def test_sizes_and_strides_compile_nothing_again(outside_the_interpreter):
    found = outside_the_interpreter("variants.variants")
    launched = {kernel for kernels in found.values() for kernel in kernels}
    assert launched >= {
        "forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel", "decode_kernel", "combine_kernel",
        "backward_kernel", "softmax_forward_kernel", "softmax_backward_kernel", "cross_entropy_forward_kernel",
        "cross_entropy_backward_kernel", "jsd_kernel", "rotate_kernel", "append_kernel", "paged_kernel", "join_kernel",
        "statistics_kernel", "specialized_forward_kernel", "specialized_dkdv_kernel", "specialized_dq_kernel",
    }  # fmt: skip
    compiled = {(group, kernel): n for group, kernels in found.items() for kernel, (n, _) in kernels.items()}
    assert compiled == {place: MORE.get(place, 1) for place in compiled}
    assert all(launches > n for kernels in found.values() for n, launches in kernels.values())
