"""Losses over several processes: two of them, on gloo, against one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forked
from tests.kernels import sharded_checks

SIZE = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All checks in one start of the processes, which takes longer than the checks."""
    folder = tmp_path_factory.mktemp("sharded")
    forked.run(sharded_checks.run, (SIZE, str(folder)), SIZE)
    return folder


@pytest.mark.parametrize("check", sharded_checks.CHECKS)
def test_two_processes(results, check):
    for rank in range(SIZE):
        found = (results / f"{check}.{rank}").read_text()
        assert not found, f"rank {rank}:\n{found}"
