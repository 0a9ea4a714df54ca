from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.cases import OURS, PYTORCH
from benchmarks.scaling import LENGTH, PROCESSES, SIZE, Point
from fastllm.config import ParallelConfig
from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[2]


def test_a_point_is_a_training_run():
    """In two processes, with the memory that was planned: of so small a model within a third."""
    point = Point(PROCESSES, 2, "2 processes", OURS, 1024, processes=2)
    scaling.measure(point, scaling._with(scaling._small(2), 1024, 2, 256), 0.1)
    assert point.error == ""
    assert 0 < point.low <= point.seconds <= point.high
    assert 0 < point.mfu < 2
    assert point.planned == pytest.approx(point.memory, rel=0.34)


def test_a_machine_without_tyro(tmp_path):
    """Only the command line needs it; benchmarks also run where nothing can be installed."""
    for missing in ("tyro", "ruff"):
        (tmp_path / f"{missing}.py").write_text("raise ImportError('not installed')")
    program = tmp_path / "program.py"
    program.write_text("""
import benchmarks.__main__, benchmarks.goals, benchmarks.gpu, benchmarks.small_shapes, benchmarks.tiles
from benchmarks import scaling

if __name__ == "__main__":
    point = scaling.Point(scaling.SIZE, 1, "small", scaling.PYTORCH, 1024)
    scaling.measure(point, scaling._with(scaling._small(1), 1024, 2, 256), 0.01)
    assert not point.error and point.seconds > 0, point.error
""")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    found = subprocess.run(
        [sys.executable, str(program)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert found.returncode == 0, found.stderr


def test_what_fails_says_so():
    point = Point(SIZE, 1, "wrong", PYTORCH, 1024, processes=2)
    config = scaling._with(scaling._small(1), 1024, 2, 256)
    scaling.measure(point, replace(config, parallel=ParallelConfig(dp_replicate=3)), 0.1)
    assert "2 ranks can't be divided" in point.error
    assert point.seconds == 0
    assert point.error in scaling.table([point])


def test_table_and_plot(tmp_path):
    points = [
        Point(axis, 10**n, f"{n}", name, 1000, 1, 0.1 * n, 0.09 * n, 0.11 * n, 0.3, 2**28 * n, 2**27 * (name == OURS))
        for axis in (SIZE, LENGTH, PROCESSES)
        for name in (OURS, PYTORCH)
        for n in (1, 2, 3)
    ]
    assert [Point(**p) for p in json.loads(json.dumps([asdict(p) for p in points]))] == points
    lines = scaling.table(points).splitlines()
    assert "| 2 (100) | fastllm | 200.0 | 180.0–220.0 | 5,000 | 30.0% | 512 | 128 |" in lines
    assert "| 3 | PyTorch | 300.0 | 270.0–330.0 | 3,333 | 30.0% | 768 | |" in lines
    scaling.draw(points, {"70b": {8: 2.0**37, 1024: 2.0**34}}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
