"""Every case and implementation for pytest-benchmark, one after another:

    pytest benchmarks/ --benchmark-only -k "rms_norm and 4096"

`python -m benchmarks` takes turns instead, which is steadier, and writes the report.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import Case, Scale
from .suite import every_case
from .timing import CLOCK

EACH = [(case, name) for case in every_case(Scale()) for name in case.implementations]


@pytest.mark.parametrize(("case", "name"), EACH, ids=[f"{case.title}, {name}" for case, name in EACH])
def test_case(benchmark: Any, case: Case, name: str) -> None:
    torch._dynamo.reset()
    call = case.build()[name]
    benchmark.group = case.title
    benchmark.extra_info.update(implementation=name, work=case.work, unit=case.unit)
    benchmark.pedantic(CLOCK.timed(call), warmup_rounds=3, rounds=15)
