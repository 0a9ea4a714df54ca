"""A corpus from sources: what is kept and why, the same at any number of processes, and after a kill."""

from __future__ import annotations

import json
import os
import pydoc
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm.cli import main
from fastllm.data import read_corpus
from fastllm.data.corpus import parts, stages
from fastllm.data.corpus.executors import prepare_with_datatrove
from fastllm.data.corpus.prepare import begun, open_files, prepare
from fastllm.data.corpus.recipe import Recipe, SourceSpec, load_recipe
from fastllm.data.corpus.shards import read_report
from fastllm.data.deduplication import DecontaminationSettings
from fastllm.data.document import Document
from fastllm.errors import UserError

TEXT = "".join(Path(module.__file__ or "").read_text() for module in (random, json.decoder, subprocess, pydoc))
NOWHERE = DecontaminationSettings(files=("nowhere",))
WORDS = sorted({word.lower() for word in TEXT.split() if word.isalpha()})


def essay(seed: int, words: int = 200) -> str:
    """Different running text for each seed, which no quality rule drops."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(words // 10):
        chosen = rng.choices(WORDS, k=8)
        sentences.append(f"The {' '.join(chosen)} of it.".capitalize())
    return "\n".join(" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4))


def write_jsonl(path: Path, texts: list[str], **more: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


@pytest.fixture
def bare() -> Recipe:
    """A recipe without the quality filters: what happens to a document is in the test."""
    return Recipe().without(("language", "gopher", "c4", "fineweb", "repetition"))


def with_sources(recipe: Recipe, *paths: Path) -> Recipe:
    return Recipe(
        tuple(SourceSpec(str(path), path.name) for path in paths),
        recipe.readers,
        recipe.filters,
        recipe.exact_duplicates,
        recipe.near_duplicates,
        recipe.decontamination,
    )


def test_documents_carry_where_they_come_from(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [essay(1), essay(2)], url="https://example.org/x")
    outcome = prepare(with_sources(Recipe(), source), tmp_path / "out", 1)
    documents = list(read_corpus(tmp_path / "out"))
    assert outcome.problems == 0 and outcome.report["documents"] == len(documents) == 2
    assert documents[0]["text"] == essay(1)
    assert documents[0]["source"] == "a.jsonl" and documents[0]["url"] == "https://example.org/x"
    assert documents[0]["language"] == "en" and 0 < documents[0]["language_probability"] <= 1


def test_duplicates_go_across_sources_and_the_first_stays(tmp_path, bare):
    texts = [essay(n) for n in range(6)]
    near = texts[2].replace(texts[2].split()[50], "changed", 1)
    a = write_jsonl(tmp_path / "a.jsonl", texts)
    b = write_jsonl(tmp_path / "b.jsonl", [texts[1], near, essay(99)])
    report = prepare(with_sources(bare, a, b), tmp_path / "out", 1).report
    assert [document["text"] for document in read_corpus(tmp_path / "out")] == [*texts, essay(99)]
    dropped = report["sources"][1]["dropped"]
    assert dropped["exact_duplicates"] == {"the text of a document before": [1, len(texts[1])]}
    assert dropped["near_duplicates"] == {"nearly the text of a document before": [1, len(near)]}
    assert report["sources"][1]["read"][0] == 3 and report["sources"][1]["kept"] == [1, len(essay(99))]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {sample["fate"] for sample in samples} >= {"kept", "exact_duplicates", "near_duplicates"}
    off = bare.without(("exact_duplicates", "near_duplicates"))
    prepare(with_sources(off, a, b), tmp_path / "all", 1)
    assert len(list(read_corpus(tmp_path / "all"))) == 9


def test_evaluation_text_is_left_out(tmp_path, bare):
    question = essay(5, 60)
    evaluation = write_jsonl(tmp_path / "mmlu.jsonl", [question])
    source = write_jsonl(tmp_path / "a.jsonl", [essay(1), f"{essay(2)}\n{question}\n{essay(3)}"])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[sources]]\npath = "a.jsonl"\n[decontamination]\nfiles = ["mmlu.jsonl"]\n[filters.gopher]\nenabled = false\n'
    )
    report = prepare(load_recipe(recipe), tmp_path / "out", 1).report
    assert report["sources"][0]["dropped"]["decontamination"][f"text of {evaluation.name}"][0] == 1
    assert [document["text"] for document in read_corpus(tmp_path / "out")] == [essay(1)]
    del source


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".zst"}


@pytest.fixture
def many(tmp_path, bare, monkeypatch) -> Recipe:
    """Sources of several parts and batches, damaged in one place."""
    monkeypatch.setattr(parts, "BATCH", 20_000)
    monkeypatch.setattr(parts, "PART", 100_000)
    a = write_jsonl(tmp_path / "a.jsonl", [essay(n) for n in range(150)])
    b = write_jsonl(tmp_path / "b.jsonl", [essay(n) for n in range(100, 250)])
    b.write_text(b.read_text().replace("\n", "\n{not json\n", 1))
    return with_sources(bare, a, b)


def test_the_corpus_does_not_depend_on_the_number_of_processes(tmp_path, many):
    one = prepare(many, tmp_path / "one", 1)
    two = prepare(many, tmp_path / "two", 2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") and len(tree(tmp_path / "one")) > 2
    assert len(list(read_corpus(tmp_path / "two"))) == 250
    assert one.problems == two.problems == 1
    (damage,) = two.report["damage"]
    assert "b.jsonl" in damage["where"] and "2" in damage["where"]
    for key in ("documents", "sources", "languages", "lengths", "damage", "recipe"):
        assert one.report[key] == two.report[key]


def test_an_interrupted_preparation_continues(tmp_path, many, monkeypatch):
    prepare(many, tmp_path / "whole", 1)
    calls = 0

    def stop(documents: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt

    preparation = stages.Preparation(many, open_files(many), tmp_path / "out")
    with begun(preparation) as anything, pytest.raises(KeyboardInterrupt):
        preparation.clean(0, 1, stop)
    assert anything
    done = len(preparation.parts())
    assert done and not list((tmp_path / "out" / "work").rglob("*.part"))
    with pytest.raises(UserError, match="is not finished: run fastllm data prepare again"):
        read_report(tmp_path / "out")
    outcome = prepare(many, tmp_path / "out", 2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert outcome.problems == 1 and not (tmp_path / "out" / "work").exists()
    again = prepare(many, tmp_path / "out", 1)  # nothing to do
    assert again.report == outcome.report


SMALL_PARTS = """
import sys
from fastllm.cli import main
from fastllm.data.corpus import parts

parts.BATCH, parts.PART = 20_000, 200_000
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_preparation_continues(tmp_path):
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", [essay(1000 * n + i, 400) for i in range(200)]) for n in range(3)]
    options = ["--processes", "2", "--without", "language", "gopher", "c4", "fineweb", "repetition"]
    run = [sys.executable, "-c", SMALL_PARTS, "data", "prepare", *map(str, sources), *options, "--out"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = subprocess.Popen([*run, str(out)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.rglob("00001.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.rglob("00001.json")) and not (out / "report.json").exists()
    for folder in (out, whole):
        subprocess.run([*run, str(folder)], check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert tree(out) == tree(whole)


def test_other_settings_do_not_continue_a_preparation(tmp_path, bare):
    source = write_jsonl(tmp_path / "a.jsonl", [essay(1)])
    prepare(with_sources(bare, source), tmp_path / "out", 1)
    with pytest.raises(UserError, match="was prepared from other settings"):
        prepare(with_sources(Recipe(), source), tmp_path / "out", 1)
    write_jsonl(source, [essay(1), essay(2)])
    with pytest.raises(UserError, match="from other files, or files that have changed"):
        prepare(with_sources(bare, source), tmp_path / "out", 1)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: choose another folder"):
        prepare(with_sources(bare, source), tmp_path / "else", 1)


class Crash:
    """A source of which one record kills the process that extracts it."""

    name, kind, format = "crash", "text", "text"

    def records(self, log):
        yield from range(10)

    def extract(self, record):
        if record == 3:
            os._exit(11)
        if record == 5:
            raise ValueError("odd")
        return Document(essay(record), self.name, "text", str(record))


def test_a_record_that_kills_a_worker_is_named_and_the_rest_goes_on(tmp_path, bare, monkeypatch):
    recipe = with_sources(bare, Path("crash"))
    monkeypatch.setattr("fastllm.data.corpus.prepare.open_source", lambda path, options, seen: [Crash()])
    outcome = prepare(recipe, tmp_path / "out", 2)
    assert [document["id"] for document in read_corpus(tmp_path / "out")] == list("01246789")
    assert outcome.problems == 2
    assert {entry["where"] for entry in outcome.report["damage"]} == {"crash, record 3", "crash, record 5"}


@pytest.mark.parametrize("damage", ["truncate", "change", "remove"])
def test_a_damaged_shard_is_named(tmp_path, bare, damage):
    source = write_jsonl(tmp_path / "a.jsonl", [essay(n) for n in range(50)])
    prepare(with_sources(bare, source), tmp_path / "out", 1)
    shard = tmp_path / "out" / "00000.jsonl.zst"
    content = bytearray(shard.read_bytes())
    if damage == "truncate":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "change":
        content[len(content) // 2] ^= 0xFF
        shard.write_bytes(content)
    else:
        shard.unlink()
    with pytest.raises(UserError, match=r"00000\.jsonl\.zst"):
        list(read_corpus(tmp_path / "out"))


def test_a_full_disk_is_said_and_a_rerun_continues(tmp_path, many, monkeypatch):
    save, calls = np.save, 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(parts.np, "save", full)
    with pytest.raises(UserError, match="No space left on device; a rerun continues"):
        prepare(many, tmp_path / "out", 1)
    monkeypatch.setattr(parts.np, "save", save)
    prepare(many, tmp_path / "out", 1)
    prepare(many, tmp_path / "whole", 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_from_the_command_line(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [essay(n) for n in range(20)] + ["too short", essay(3)])
    prepare = ["data", "prepare", str(source), "--processes", "1", "--out"]
    assert main([*prepare, str(tmp_path / "out")]) == 0
    assert "20 documents of 22" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| gopher |" in report and "| exact_duplicates |" in report
    assert main(["data", "inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "20 documents" in shown and "dropped by gopher" in shown and "too short" in shown
    assert main(["data", "inspect", str(tmp_path / "out"), "--only", "nothing"]) == 2
    assert main(["data", "inspect", str(tmp_path / "out"), "--json"]) == 0
    capsys.readouterr()
    source.write_text('{"text": "short"}\n')
    assert main([*prepare, str(tmp_path / "none")]) == 1
    assert "nothing is left" in capsys.readouterr().err
    source.write_text(json.dumps({"text": essay(1)}) + "\n{broken\n")
    assert main([*prepare, str(tmp_path / "damaged")]) == 1
    assert "line 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[sources]]\nname = 'x'\n", "has no path"),
        ("sources = 3\n", "must be tables"),
        ("[filters.gophr]\n", "did you mean 'gopher'"),
        ("[filters.gopher]\nmin_word = 3\n", "unknown key"),
        ("[filters.gopher]\nmin_words = 'a'\n", "whole number"),
        ("[[sources]]\npath = 'a'\nweight = -1\n", "at least 0"),
        ("[[sources]]\npath = 'a'\n[[sources]]\npath = 'b'\nname = 'a'\n", "two sources are called a"),
        ("[near_duplicates]\nthreshold = 2.0\n", "threshold"),
        ("[near]\n", "unknown key"),
        ("[readers]\ndocument = -1\n", "document must be greater than 0"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path, content, message):
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_datatrove_runs_the_same_tasks(tmp_path, many):
    assert prepare_with_datatrove(many, tmp_path / "out", "local", tasks=2, workers=1)
    prepare(many, tmp_path / "one", 1)
    texts = [[document["text"] for document in read_corpus(tmp_path / name)] for name in ("out", "one")]
    assert texts[0] == texts[1]
    assert prepare_with_datatrove(many, tmp_path / "out", "local", tasks=2)  # nothing to do


def test_a_mistake_in_the_settings_does_not_block_the_folder(tmp_path, bare, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [essay(1)])
    with pytest.raises(UserError, match="nowhere"):
        prepare(replace(with_sources(bare, source), decontamination=NOWHERE), tmp_path / "out", 1)
    assert prepare(with_sources(bare, source), tmp_path / "out", 1).report["documents"] == 1


def test_evaluation_files_that_changed_are_another_preparation(tmp_path, bare):
    source, question = (write_jsonl(tmp_path / f"{n}.jsonl", [essay(n)]) for n in (1, 2))
    recipe = replace(with_sources(bare, source), decontamination=replace(NOWHERE, files=(str(question),)))
    prepare(recipe, tmp_path / "out", 1)
    write_jsonl(question, [essay(1), essay(2)])
    with pytest.raises(UserError, match="from other evaluation files"):
        prepare(recipe, tmp_path / "out", 1)


@pytest.mark.parametrize("left", ["plan.json", ".plan.json.77.part"])
def test_a_preparation_that_was_killed_at_its_begin_continues(tmp_path, bare, left):
    recipe = with_sources(bare, write_jsonl(tmp_path / "a.jsonl", [essay(1)]))
    out = tmp_path / "out"
    with begun(stages.Preparation(recipe, open_files(recipe), out)):
        pass
    (out / "work").rmdir()
    (out / "plan.json").rename(out / left)
    (out / "run.lock").touch()
    prepare(recipe, out, 1)
    assert {path.suffix for path in out.iterdir()} == {".zst", ".json", ".jsonl", ".md", ".png"}


def test_a_corpus_in_a_folder_of_sources_is_no_source(tmp_path, bare):
    folder = tmp_path / "sources"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [essay(1)])
    out = folder / "out"
    first = prepare(with_sources(bare, folder), out, 1)
    assert prepare(with_sources(bare, folder), out, 1).report == first.report  # complete: nothing to do
    (out / "report.json").unlink()
    (out / "work").mkdir()  # as if killed at its end
    assert prepare(with_sources(bare, folder), out, 1).report["read"] == first.report["read"]
    with pytest.raises(UserError, match="is a corpus, finished or not, which fastllm made"):
        prepare(with_sources(bare, out), tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("processes", [-1, 100_000])
def test_a_number_of_processes_that_can_not_be_is_refused(tmp_path, bare, processes):
    source = write_jsonl(tmp_path / "a.jsonl", [essay(1)])
    with pytest.raises(UserError, match="--processes must be from 1 to"):
        prepare(with_sources(bare, source), tmp_path / "out", processes)


def test_datatrove_from_the_command_line(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [essay(n) for n in range(3)])
    run = ["data", "prepare", str(source), "--executor", "local", "--processes", "1", "--out", str(tmp_path / "out")]
    assert main(run) == 0
    assert "3 documents of 3" in capsys.readouterr().out
    assert read_report(tmp_path / "out")["seconds"] > 0


def test_figures_of_a_source_whose_name_is_not_utf8_add_up(tmp_path, bare):
    source = write_jsonl(tmp_path / os.fsdecode(b"bad\xff\n.jsonl"), [essay(1), essay(1), essay(2)])
    source.write_text(source.read_text() + "{broken\n")
    report = prepare(Recipe((SourceSpec(str(source)),), bare.readers, bare.filters), tmp_path / "out", 1).report
    (found,) = report["sources"]
    assert found["name"].endswith(r"bad\xff\n.jsonl") and report["problems"] == 1
    assert found["read"][0] == 3 == found["kept"][0] + found["dropped"]["exact_duplicates"].popitem()[1][0]


def test_a_recipe_may_have_many_sources_but_not_any_number():
    began = time.process_time()
    assert len(Recipe(tuple(SourceSpec(f"{n}.jsonl") for n in range(60_000))).sources) == 60_000
    assert time.process_time() - began < 5
    with pytest.raises(UserError, match="at most 65,535 are possible: name their folder"):
        Recipe(tuple(SourceSpec(f"{n}.jsonl") for n in range(70_000)))


def test_a_name_is_no_formula_in_the_picture(tmp_path, bare):
    source = write_jsonl(tmp_path / "a$x_$.jsonl", [essay(1)])
    assert prepare(with_sources(bare, source), tmp_path / "out", 1).report["documents"] == 1
