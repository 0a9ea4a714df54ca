"""Attention's specialised warps as Triton compiled them, run in numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from .attention import CASES


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """In a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.ttgir.attention"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_by_the_rule(found, case):
    assert found[case] == ""


def test_no_wait_is_missed_unseen(found):
    count, *unseen = found["faults"]
    assert int(count.split()[0]) >= 10
    assert unseen == []
