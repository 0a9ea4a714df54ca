"""``fastllm data`` and ``fastllm tokenizer`` from the command line: exit codes, and what is said of odd input."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from fastllm.cli import main
from fastllm.data.corpus.inspect import inspect

from .corpora import write_corpus

TEXT = "One of the documents of a small corpus, which is long enough for a few merges.\n"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n{broken\n" + json.dumps({"text": TEXT}) + "\n")
    return path


def test_damage_in_the_text_of_a_tokenizer_is_said(tmp_path, lines, capsys):
    out = tmp_path / "tokenizer.json"
    assert main(["tokenizer", "train", str(lines), "--vocab-size", "280", "--out", str(out)]) == 1
    assert "a.jsonl, line 2" in capsys.readouterr().err
    assert main(["tokenizer", "inspect", str(out), "--data", str(lines), "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["text"]["total"]["documents"] == 2 and "a.jsonl, line 2" in shown.err


def test_a_tokenizer_needs_documents(tmp_path, capsys):
    corpus, out = write_corpus(tmp_path / "corpus", []), tmp_path / "tokenizer.json"
    for paths, message in (([], "there is no text to train on"), ([corpus], "there is no document to train on")):
        assert main(["tokenizer", "train", *map(str, paths), "--vocab-size", "300", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("names", [("plan.json", "work"), ("index.json", "tokenizer.json")])
def test_folders_of_ours_are_no_text(tmp_path, capsys, names):
    for name in names:
        (tmp_path / name).mkdir() if name == "work" else (tmp_path / name).write_text("{}")
    (tmp_path / "00000.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    assert main(["tokenizer", "train", str(tmp_path), "--vocab-size", "300"]) == 2
    assert "which fastllm made: it is no source of text" in capsys.readouterr().err


@pytest.mark.parametrize("width", [40, 200])
def test_figures_are_legible_at_any_width(tmp_path, width):
    corpus = write_corpus(tmp_path / "corpus", [[{"text": TEXT}] * 3])
    report = json.loads((corpus / "report.json").read_text())
    report |= {"read": [1_234_567, 9_876_543_210], "languages": {"en": 3}, "lengths": {"kept": {"128": 3}}}
    report |= {"documents": 3, "characters": 3, "problems": 0, "damage": [], "recipe": {"filters": []}}
    source = {"name": "web", "weight": 0.0, "kinds": {"web": 3}, "skipped": {}, "dropped": {}, "problems": 0}
    report["sources"] = [source | dict.fromkeys(("read", "cleaned", "kept"), report["read"])]
    (corpus / "report.json").write_text(json.dumps(report))
    (corpus / "samples.jsonl").write_text("")
    terminal = Console(file=io.StringIO(), width=width)
    terminal.print(inspect(corpus))
    assert terminal.file.getvalue().count("9,876,543,210") == 3  # type: ignore[attr-defined]


def test_a_corpus_without_documents_is_not_tokenized(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", [])
    run = ["data", "tokenize", str(corpus), "--tokenizer", "tokenizer.json", "--out", str(tmp_path / "tokens")]
    assert main(run) == 2
    assert "there is no document with text" in capsys.readouterr().err and not (tmp_path / "tokens").exists()
    assert main([*run, "--processes", "-3"]) == 2
    assert "--processes must be from 1 to" in capsys.readouterr().err


def test_a_pipe_is_not_replaced_by_a_file(tmp_path, lines, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["tokenizer", "train", str(lines), "--vocab-size", "280", "--out", str(pipe)]) == 2
    assert "it is a pipe or a device" in capsys.readouterr().err and pipe.is_fifo()
