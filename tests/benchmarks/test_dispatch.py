"""What a call costs on the host, in Python calls, which are the same on every machine."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

# The most of each op, on a CPU and with Triton up to the launch. Python 3.11; later versions enter fewer functions.
MOST = {
    "rms_norm": (42, 60),
    "rms_norm, for a backward": (72, 90),
    "flash_attention": (60, 96),
    "flash_attention, for a backward": (88, 128),
    "flash_decode": (62, 98),
    "softmax": (50, 66),
    "cross_entropy": (100, 117),
    "swiglu": (54, 77),
    "rope": (133, 180),
    "rope_append": (95, 149),
    "flash_decode, in pages": (78, 111),
}


def test_calls_enter_few_functions(outside_the_interpreter):
    """Whoever makes a call longer should know what for: a microsecond or so for every seven functions."""
    found = outside_the_interpreter("dispatch.counts")
    assert found.keys() == MOST.keys()
    assert all(min(calls.values()) > 20 for calls in found.values())  # our ops, not PyTorch's
    too_many = {
        (op, backend): found[op][backend]
        for op, most in MOST.items()
        for backend, limit in zip(("cpu", "triton"), most, strict=True)
        if found[op][backend] > limit
    }
    assert not too_many
