"""Jobs in processes of their own: no failure hides the others. And the small shapes, which are such jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import accuracy, apart, small_shapes
from benchmarks.pointwise import eager_swiglu
from fastllm.kernels import backends, swiglu

CHILD = """
import os, sys, time
from pathlib import Path
from benchmarks import apart

lost = []

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def breaks():
    lost.append(True)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def bad():
    print("what a library prints")
    raise ValueError("no|thing\\nmore")

apart._synchronize = synchronize
names = sys.argv[2:]
jobs = {"good": dict, "bad": bad, "pid": lambda: {"pid": os.getpid()}, "breaks": breaks, "again": dict,
        "crashes": lambda: os._exit(7), "hangs": lambda: time.sleep(1000), "last": dict}
sys.exit(apart.work(jobs, names))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "child.py").write_text(f"import sys; sys.path.insert(0, {str(apart.ROOT)!r})\n{CHILD}")
    return [sys.executable, str(tmp_path / "child.py"), "--jobs"]


def test_no_failure_hides_the_others(command):
    names = ["good", "bad", "pid", "breaks", "again", "crashes", "last"]
    found = {o.name: o for o in apart.run(command, names, patience=600)}
    assert list(found) == names
    assert {name: o.error for name, o in found.items() if o.error} == {
        "bad": "ValueError: no|thing",
        "breaks": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "crashes": "the process ended (exit 7)",
    }
    assert found["pid"].found["pid"] > 0


def test_a_job_that_hangs_is_given_up(command):
    good, hangs, last = apart.run(command, ["good", "hangs", "last"], patience=1.0, start=600)
    assert (good.error, hangs.error) == ("", "no answer in 1 s: killed (exit -9)")
    assert last == apart.Outcome("last", "", last.seconds, {})


def test_children_that_do_not_begin_are_not_tried_again_and_again(tmp_path):
    begun = tmp_path / "begun"
    code = f"open({str(begun)!r}, 'a').write('x'); raise ImportError('no torch')"
    found = list(apart.run([sys.executable, "-c", code], ["a", "b"], patience=600))
    assert [(o.name, o.error) for o in found] == [(n, "the process ended (exit 1)") for n in ("a", "b")]
    assert begun.read_text() == "x"


def test_small_shapes_are_reported_one_by_one(command, tmp_path, capsys):
    assert small_shapes.supervise(command, ["good", "bad", "breaks", "crashes", "last"], tmp_path) == 1
    printed = capsys.readouterr().out
    assert "FAILED  crashes: the process ended (exit 7)" in printed
    assert "2 of 5 small shapes passed, 3 failed, 0 not run, in " in printed
    rows = (tmp_path / "small_shapes.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["good", "bad", "breaks", "crashes", "last"]
    assert rows[1].endswith("| ValueError: no/thing |")
    assert small_shapes.supervise(command, ["good", "last"], None) == 0


def test_small_shapes_cover_every_kernel_of_a_gpu():
    names = list(small_shapes.jobs())
    for op in backends.OPS.values():
        for backend in {*op.kernels} & {*small_shapes.GPU_BACKENDS}:
            assert any(name.startswith(f"{backend} {op.name}") for name in names), (backend, op.name)
    assert sorted(name for share in apart.shares(names, 14) for name in share) == sorted(names)
    assert apart.shares(["a", "b"], 14) == [["a"], ["b"]]


def test_small_shapes_are_right_and_wrong_ones_are_found():
    """On the CPU's kernels, which have the same rule to keep."""
    jobs = {name: job for name, job in small_shapes.jobs(("cpu",)).items() if "out of range" not in name}
    for name, job in jobs.items():
        if not any(size in name for size in ("65544", "131073")):
            job()

    def wrong(gate: Tensor, up: Tensor, backend: str) -> Tensor:
        return swiglu(gate, up) * (1 if backend == "torch" else 1.01)

    probe = accuracy.Probe(swiglu, eager_swiglu, wrong, {"gate": torch.randn(5, 7), "up": torch.randn(5, 7)})
    with pytest.raises(AssertionError, match="errors beyond the rule: output"):
        small_shapes._run(lambda: probe, torch.float32, "cpu", True)
