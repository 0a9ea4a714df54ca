"""What results become: files, a report with errors against float64, the README, the backends' defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy, defaults, report
from benchmarks.cases import COPY, PYTORCH, is_ours, is_theirs
from benchmarks.record import Result, Row, best
from fastllm.errors import UserError
from tests.benchmarks.made_up import BEFORE, rows


def test_results_round_trip(tmp_path):
    result = Result({"device": "d"}, {"copy": 9.0}, rows(BEFORE), [accuracy.Error("a", "b", "c", "d", 1.0, 2.0, True)])
    result.write(tmp_path / "deep" / "r.json")
    assert Result.read(tmp_path / "deep" / "r.json") == result
    result.rows[0].host = 3e-5
    result.write(tmp_path / "gpu.json")
    assert Result.read(tmp_path / "gpu.json") == result
    (tmp_path / "old.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="no result file of version 1"):
        Result.read(tmp_path / "old.json")


def test_the_best_leaves_its_inputs_alone():
    found = rows({COPY: 0.5, "fastllm cpu": 2.0, "fastllm cpu, in place": 1.0, PYTORCH: 4.0, "SDPA flash": 3.0})
    assert best(found, is_ours).implementation == "fastllm cpu"
    assert best(found, is_theirs).implementation == "SDPA flash"


def test_a_gpus_report_has_shares_of_its_data_sheet():
    stamp = {"device": "d", "gpu": "NVIDIA H200", "timed": "in turns"}
    slow = replace(rows({PYTORCH: 1.0})[0], error="OutOfMemoryError: a|b", seconds=0.0)
    ours = replace(rows({"fastllm cuda": 0.001})[0], host=2e-5)  # 1e9 bytes in a millisecond
    found = [ours, *rows({"fastllm triton": 0.002}), slow]
    text = report.report(Result(stamp, {"copy": 4000.0, "bfloat16": 700.0, "float32": 50.0}, found), [])
    assert "Its data sheet says 4800 GB/s and 989 TFLOP/s." in text
    assert "| fastllm cuda | 1 | 0.02 | 0.02 |  | 1,000 GB/s | 25% | 21% |" in text
    assert "| fastllm triton | 2 | 0.04 | waits |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "OutOfMemoryError: a/b" in table[-1]


def test_errors_are_within_the_rule():
    found = list(accuracy.measure())
    assert {(e.op, e.backend) for e in found} >= {("flash_attention", "cpu"), ("cross_entropy", "torch")}
    assert {"dq", "dk", "dv", "output"} <= {e.output for e in found if e.op == "flash_attention"}
    assert [e for e in found if not e.within] == []


def test_the_verdict_on_errors_can_be_no(monkeypatch):
    def softmax(x: torch.Tensor, backend: str) -> torch.Tensor:
        if backend != "torch" and x.dtype == torch.float16:
            raise RuntimeError("no kernel\nfor this")
        return torch.softmax(x, -1) * (1 if backend == "torch" else 1.001)

    monkeypatch.setattr(accuracy, "softmax", softmax)
    found = list(accuracy.measure(("softmax",)))
    assert {e.op for e in found} == {"softmax"}
    assert {e.within for e in found if e.backend == "torch"} == {True}
    cpu = {(e.dtype, e.output): e.within for e in found if e.backend == "cpu"}
    assert not cpu["float32", "output"] and not cpu["float16", "RuntimeError: no kernel"]
    result = Result({"device": "d", "timed": "in turns"}, errors=found)
    assert "| softmax | float16 | cpu | RuntimeError: no kernel | **no** |" in report.report(result, [])


def test_a_dtype_that_a_backend_does_not_take_is_left_out_with_the_reason(simt):
    errors = list(accuracy.measure(("flash_decode",)))
    found = [e for e in errors if e.backend == "cuda"]
    assert {(e.dtype, e.within) for e in found} == {("float32", None), ("float16", True), ("bfloat16", True)}
    result = Result({"device": "d", "timed": "in turns", "torch": "2"}, errors=errors)
    reason = "its kernels take float16 and bfloat16, which tensor cores multiply, not float32"
    assert f"| flash_decode | float32 | cuda | {reason} | left out |" in report.report(result, [])
    held = len(errors) - 1
    assert f"Of {held} outputs and gradients held against float64, {held} are within" in report._device(Path(), result)


def test_the_readmes_are_generated():
    for path, part in report.measured_parts().items():
        assert part in path.read_text(), "python -m benchmarks --readme"


def test_defaults_follow_from_the_results():
    assert defaults.FILE.read_text() == defaults.text(), "python -m benchmarks --defaults"
    both = rows({"fastllm triton": 2.0, "fastllm cuda": 1.0, PYTORCH: 9.0})
    other = [replace(r, size="9×9", seconds=s) for r, s in zip(both, (1.0, 1.5, 9.0), strict=True)]
    assert defaults.fastest(Result({}, rows=[*both, *other])) == {"rms_norm": "cuda"}
    forward = [replace(r, direction="forward", seconds=s) for r, s in zip(both, (1.0, 99.0, 9.0), strict=True)]
    assert defaults.fastest(Result({}, rows=[*both, *forward])) == {"rms_norm": "cuda"}
    assert defaults.fastest(Result({}, rows=forward)) == {"rms_norm": "triton"}
    assert defaults.fastest(Result({}, rows=rows({"fastllm cpu": 1.0}))) == {}


def test_the_default_of_attention_is_the_faster_of_triton_and_cuda(monkeypatch):
    def of(op: str, direction: str, triton: float, cuda: float, **more: Any) -> list[Row]:
        times = {"fastllm triton": triton, "fastllm cuda": cuda, "SDPA flash": 0.1}
        return [replace(r, op=op, direction=direction, **more) for r in rows(times)]

    trained = of("flash_attention", "forward+backward", 3.0, 2.0)
    others = of("flash_attention", "forward", 1.0, 9.0) + of("flash_attention, window", "forward+backward", 1.0, 9.0)
    others += [replace(r, implementation="fastllm", sweep="tokens") for r in of("flash_attention", "step", 1.0, 1.0)]
    failed = of("flash_attention", "forward+backward", 1.0, 0.0, size="9×9")
    failed[1].error = "OutOfMemoryError"
    decoded = of("flash_decode", "forward", 1.0, 2.0)
    result = Result({"gpu": "a GPU"}, rows=[*trained, *others, *failed, *decoded])
    assert defaults.fastest(result) == {"flash_attention": "cuda", "flash_decode": "triton"}
    monkeypatch.setattr(defaults, "committed", lambda: [(Path(), result)])
    found: dict[str, Any] = {}
    exec(defaults.text(), found)
    assert found["MEASURED_FASTER"] == {
        ("flash_attention", "a GPU"): "cuda",
        ("flash_decode", "a GPU"): "triton",
    }
