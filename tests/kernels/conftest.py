"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastllm.kernels import native


@pytest.fixture(params=native.KERNELS["cpu"].instruction_sets() if "cpu" in native.KERNELS else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that this processor runs, in use."""
    cpu = native.KERNELS["cpu"]
    best = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(best)
