"""Times with benchmarks.timing's clock, and prints implementations side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.timing import CLOCK, DEVICE, stamp


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session", autouse=True)
def backed_memory() -> None:
    """Write to a quarter of the memory once: a virtual machine's host hands out pages slowly the first time."""
    if DEVICE.type == "cpu" and hasattr(os, "sysconf"):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        torch.ones(size, dtype=torch.int8)


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """``measure(call, case=..., implementation=..., bytes=...)``: time a call and note what it is."""

    def run(
        call: Callable[[], Any],
        *,
        case: str,
        implementation: str,
        rounds: int | None = None,
        warmup: int | None = None,
        **facts: Any,
    ) -> None:
        benchmark.group = case
        benchmark.extra_info.update(case=case, implementation=implementation, **facts)
        usual = (5, 50) if DEVICE.type == "cuda" else (20, 25)
        benchmark.pedantic(CLOCK.timed(call), warmup_rounds=warmup or usual[0], rounds=rounds or usual[1])

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(stamp())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep what can be committed: no host names, no run-by-run data."""
    output_json.pop("commit_info", None)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    entries = [b.as_dict(include_data=False) for b in getattr(session, "benchmarks", []) if b]
    if entries:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.markdown(entries))
