"""pytest-benchmark on benchmarks.timing's clock, stamped like our own results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .timing import CLOCK, DEVICE, stamp


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session", autouse=True)
def group_of_one() -> Iterator[None]:
    """The training steps are FSDP2's."""
    from fastllm.distributed.mesh import process_group

    with process_group(DEVICE):
        yield


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(stamp())
