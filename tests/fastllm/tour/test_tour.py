"""``fastllm tour --quick``, from the first file to the report; and folders that it doesn't take."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastllm.cli import main
from fastllm.tour.runner import STATE
from fastllm.tour.sizes import QUICK
from fastllm.tour.stages import ALIGNED, stages


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """It takes a minute: thirteen stages, of which twelve are processes."""
    out = tmp_path_factory.mktemp("out") / "tour"
    assert main(["tour", "--quick", "--out", str(out)]) == 0
    return out


def test_the_report(finished):
    text = (finished / "report.md").read_text()
    for stage in stages(QUICK, 0):
        assert f"| {stage.name} |" in text
    assert "sources/wiki.xml.bz2" in text
    assert "by decontamination" in text
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((finished / STATE).read_text())
    assert [*state["seconds"]] == [stage.name for stage in stages(QUICK, 0)]
    for stage in stages(QUICK, 0):
        assert all((finished / name).exists() for name in stage.makes), stage.name


def test_a_small_model_learns_something(finished):
    """No more is promised of the quick tour."""
    before, after = (json.loads((finished / f"results/{name}-exam.json").read_text())["tasks"]["mmlu_continuation"]
                     for name in ("untrained", "base"))  # fmt: skip
    assert before["interval"][0] < 0.25 < before["interval"][1]
    assert after["acc"] > before["acc"]
    refused = [json.loads((finished / f"results/{name}.json").read_text())["tasks"]["refused"]["match"]
               for name in ("chat", "aligned")]  # fmt: skip
    assert refused[1] > refused[0]


def test_a_finished_stage_is_not_run_again(finished, capsys):
    state = json.loads((finished / STATE).read_text())
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    del state["seconds"]["samples"]
    (finished / STATE).write_text(json.dumps(state))
    assert main(["tour", "--quick", "--out", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == len(stages(QUICK, 0)) - 1
    assert f"fastllm serve {shlex.quote(str(finished))}/{ALIGNED}" in printed
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_command_can_be_copied(finished, tmp_path):
    """What is printed runs as it is in the tour's folder."""
    command = next(stage.command for stage in stages(QUICK, 0) if stage.name == "tokenizer")
    words = [*command[:-1], str(tmp_path / "tokenizer.json")]
    subprocess.run([sys.executable, "-m", "fastllm", *words], cwd=finished, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()


def test_other_folders(finished, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert main(["tour", "--quick", "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no tour" in capsys.readouterr().err
    assert main(["tour", "--quick", "--out", str(finished), "--seed", "1"]) == 2
    assert "holds a tour of seed 0, not 1" in capsys.readouterr().err
    assert main(["tour", "--out", str(finished)]) == 2
    assert "holds a tour of quick True, not False" in capsys.readouterr().err
    assert main(["tour", "--seed", "-1"]) == 2
    assert "--seed must not be negative" in capsys.readouterr().err


def test_a_stage_that_fails(tmp_path, capsys, monkeypatch):
    """The end of its log is shown, and the tour says where it is."""
    from fastllm.tour import run

    one, two, *_ = stages(QUICK, 0)
    monkeypatch.setattr(run, "stages", lambda size, seed: (one, two))
    (tmp_path / "tour").mkdir()
    with monkeypatch.context() as patch:
        broken = type(two)(two.name, two.about, two.makes, ("data", "prepare", "none.txt", "--out", "corpus"))
        patch.setattr(run, "stages", lambda size, seed: (one, broken))
        assert main(["tour", "--quick", "--out", str(tmp_path / "tour")]) == 2
    captured = capsys.readouterr()
    assert "none.txt" in captured.out
    assert "fastllm data prepare failed with exit code 2" in captured.err
    assert json.loads((tmp_path / "tour" / STATE).read_text())["seconds"].keys() == {"sources"}
