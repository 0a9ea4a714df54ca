"""``fastllm eval`` from the command line, on a run that was trained a moment before."""

from __future__ import annotations

import json

import pytest

from fastllm.cli import main
from fastllm.errors import UserError
from fastllm.evaluation.run import Log

from . import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose log has tasks, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "book.txt").write_text("The capital of France is Paris. The capital of Italy is Rome.\n" * 200)
    rows = [{"land": "France", "right": "Paris", "wrong": "zqxkw"}, {"land": "Italy", "right": "Rome", "wrong": "wwzz"}]
    small.write_lines(folder / "q.jsonl", rows)
    (folder / "capitals.toml").write_text(
        'files = ["q.jsonl"]\ncontext = "The capital of {land} is"\nchoices = ["{right}", "{wrong}"]\nanswer = 0\n'
    )
    (folder / "text.toml").write_text((folder / "capitals.toml").read_text())
    options = "--model.dim 32 --model.layers 1 --model.heads 2 --model.max-seq-len 64 --train.global-batch-tokens 256"
    options += " --train.steps 60 --train.eval-every 30 --optim.lr 0.02 --model.vocab-size 300"
    argv = ["train", "--data", str(folder / "book.txt"), "--out", str(folder / "run"), *options.split()]
    assert main([*argv, "--train.eval-tasks", str(folder / "capitals.toml"), "--train.eval-tasks-every", "20"]) == 0
    return folder


def eval_(folder, *options, model="run"):
    return main(["eval", str(folder / model), *map(str, options)])


def test_results(run, capsys):
    assert eval_(run, "--tasks", run / "capitals.toml", "--text", run / "book.txt", "--out", run / "r.json") == 0
    printed = capsys.readouterr().out
    found = json.loads((run / "r.json").read_text())
    assert found["tasks"].keys() == {"capitals", "text"}
    assert found["tasks"]["capitals"] | {"acc": 1.0, "n": 2, "split": "test"} == found["tasks"]["capitals"]
    assert found["tasks"]["capitals"]["interval"] == pytest.approx([0.342, 1.0], abs=1e-3)
    assert 0 < found["tasks"]["text"]["bits_per_byte"] < 2
    assert "capitals  acc" in printed
    assert "bits_per_byte" in (run / "r.md").read_text()
    # again: nothing is asked, the results are the same; and compared with themselves
    assert eval_(run, "--tasks", run / "capitals.toml", "--out", run / "r.json", "--compare", run / "r.json") == 0
    assert "against" in capsys.readouterr().out
    assert json.loads((run / "r.json").read_text())["comparison"]["tasks"]["capitals"]["acc"]["difference"] == 0


def test_tasks_during_training(run, capsys):
    records = [json.loads(line) for line in (run / "run/log.jsonl").read_text().splitlines()]
    asked = {r["step"]: r["eval.capitals.acc"] for r in records if "eval.capitals.acc" in r}
    assert asked.keys() == {0, 20, 40, 60}
    assert asked[60] == 1.0
    assert main(["report", str(run / "run")]) == 0
    printed = capsys.readouterr().out
    assert "| 60 | 1.0000 |" in printed
    assert (run / "run/report.md").read_text() == printed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tasks", "copa", "--limit", "0"], "--limit must be at least 1"),
        ([], "what is to be evaluated?"),
        (["--tasks", "copa", "--out", "r.txt"], "--out must be a .json file"),
        (["--tasks", "capital"], "there is no task 'capital'"),
        (["--tasks", "gsm8k", "--data", "."], "has no folder openai/gsm8k or gsm8k"),
        (["--text", "none.txt"], "can't read none.txt"),
        (["--tasks", "copa", "--compare", "none.json"], "can't read none.json"),
        (["--tasks", "copa", "--contamination", "none.txt"], "--contamination: there is no none.txt"),
        (["--text", "{run}/book.txt", "--contamination", "{run}/book.txt"], "searches for the items of --tasks"),
        (["--tasks", "copa", "--out", "none/r.json"], "--out: there is no folder none"),
        (["--tasks", "{run}/text.toml", "--text", "{run}/book.txt"], "a task is called text"),
        (["--text", "{run}/book.txt", "--stride", "65"], "--stride must be from 1 to the 64 tokens"),
    ],
)
def test_mistakes(run, capsys, options, reason):
    assert eval_(run, *[option.format(run=run) for option in options]) == 2
    assert reason in capsys.readouterr().err


def test_changed_files_of_the_model(run, capsys):
    """Answers of other weights or another configuration are not taken for its own."""
    assert eval_(run, "--tasks", run / "capitals.toml", "--out", run / "c.json") == 0
    (run / "run/config.toml").touch()
    assert eval_(run, "--tasks", run / "capitals.toml", "--out", run / "c.json") == 2
    assert "holds answers of another model" in capsys.readouterr().err


def test_an_unknown_task_stops_training_before_it_begins(run, capsys):
    options = ["--data", str(run / "book.txt"), "--out", str(run / "new"), "--train.eval-tasks"]
    assert main(["train", *options, "capitls"]) == 2
    assert "there is no task 'capitls'" in capsys.readouterr().err
    (run / "long.toml").write_text(
        'kind = "generation"\nfiles = ["q.jsonl"]\ncontext = "{land}"\ntarget = "{right}"\nchat = true\n'
    )
    assert main(["train", *options, str(run / "long.toml"), "--model.max-seq-len", "64"]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert not (run / "new").exists()


def test_two_processes_with_one_file(run, capsys):
    with Log(run / "t.samples.jsonl", {}):
        (run / "t.samples.jsonl").write_bytes(b"")
        with pytest.raises(UserError, match="is no file of samples, line 1"), Log(run / "t.samples.jsonl", {}):
            pass
        (run / "t.samples.jsonl").write_bytes(b'{"evaluation": {}}\n')
        with pytest.raises(UserError, match="another process writes"), Log(run / "t.samples.jsonl", {}):
            pass


def test_no_model(run, capsys):
    assert eval_(run, "--tasks", run / "capitals.toml", model="none") == 2
    assert "there is no model" in capsys.readouterr().err


def test_help_fits_a_screen(capsys):
    assert main(["eval", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 45
    assert max(map(len, lines)) <= 120
