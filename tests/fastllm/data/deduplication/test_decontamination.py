"""Overlap with evaluation files of each format."""

from __future__ import annotations

import gzip
import io
import json
import pickle

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from fastllm.data.deduplication import DecontaminationSettings, Decontaminator
from fastllm.data.document import Document
from fastllm.errors import UserError

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHORT = "What is the boiling point of water at sea level?"  # 10 words
ROWS = [{"question": QUESTION, "choices": ["yes", "no"], "n": 3, "more": {"deep": [SHORT]}}, {"question": None}]


def document(text):
    return Document(text=text, source="s", kind="web", id="1")


def arrow(path, file_format):
    table = pa.Table.from_pylist(ROWS[:1])
    writer = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with writer(str(path), table.schema) as sink:
        sink.write_table(table)


def write(path, kind):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        path.write_text("\n" + lines)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "one line":
        path.write_text(json.dumps(ROWS))
    elif kind == "gzip":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "zstd":
        path.write_bytes(b"".join(zstandard.compress(part.encode()) for part in lines.splitlines(True)))
    elif kind == "text":
        path.write_text(f"A title\n\n{QUESTION[:27]}\n{QUESTION[28:]}\n\n{SHORT}\nyes\n", encoding="utf-8-sig")
    elif kind == "text like JSON":
        path.write_text(f"[A title]\n\n{QUESTION}\n{SHORT}")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS[:1]), str(path))
    else:
        arrow(path, kind == "arrow file")


KINDS = ("jsonl", "json", "one line", "gzip", "zstd", "text", "text like JSON", "parquet", "arrow file", "arrow stream")


@pytest.mark.parametrize("kind", KINDS)
def test_formats(tmp_path, kind):
    path = tmp_path / "evaluation"
    write(path, kind)
    found = Decontaminator(DecontaminationSettings(files=(str(path),)))
    middle = QUESTION.upper().replace(",", " --\n")[12:-8]
    hit = document(f"Some page. {middle} and more")
    assert found.contaminated(hit) == "decontamination: text of evaluation"
    assert hit.metadata["contamination"]["file"] == str(path)
    assert hit.metadata["contamination"]["text"].startswith("CLIPS TO 48 OF HER FRIENDS IN APRIL")
    assert hit.metadata["contamination"]["ngrams"] == 4
    assert found.contaminated(document(f"So, {SHORT.lower()} It is 100 degrees."))
    clean = document(QUESTION.replace("sold half", "sold almost half")[20:] + " yes no " + SHORT.replace("sea", "the"))
    assert found.contaminated(clean) == "" and clean.metadata == {}
    assert found.contaminated(document("")) == ""
    assert found.short[str(path)] > 0


def test_runs_of_twelve_words_are_no_overlap(tmp_path):
    words = [f"w{i}" for i in range(40)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    found = Decontaminator(DecontaminationSettings(files=(str(tmp_path / "a.txt"),)))
    assert len(found) == 28
    for first in range(28):
        assert found.contaminated(document(" ".join(["x", *words[first : first + 13], "y"])))
        assert not found.contaminated(document(" ".join(["x", *words[first : first + 12], "y"])))


def test_overlap_and_names(tmp_path):
    words = [f"w{i}" for i in range(20)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    (tmp_path / "b.jsonl").write_text(json.dumps(SHORT) + "\n" + json.dumps(" ".join(words)))
    files = tuple(str(tmp_path / name) for name in ("a.txt", "b.jsonl"))
    found = Decontaminator(DecontaminationSettings(files=files, overlap=3))
    found = pickle.loads(pickle.dumps(found))
    assert not found.contaminated(document(" ".join(words[:14])))
    assert not found.contaminated(document(" ".join(words[:13] + words[:13] + words[:13])))
    assert found.contaminated(document(" ".join(words[:15]))) == "decontamination: text of a.txt"
    assert found.contaminated(document(SHORT)) == "decontamination: text of b.jsonl"
    assert DecontaminationSettings().build()(document(SHORT)) == ""


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"a": "b"}\n{"a": \n', "line 2"),
        ("a.json", b'[{"a": "b"},\n{"a": \n', "line 3"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "not valid JSON"),
        ("a.txt", b"\xff\xfe\x00a", "UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": "some words"}\n' * 9999)[:-20], "can't read"),
        ("a.jsonl.zst", zstandard.compress(b"\x00")[:-1] + b"\x09\x09", "a.jsonl.zst"),
        ("a.parquet", b"PAR1 and nothing", "can't read"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\x00", "can't read"),
        ("a.txt", b"", "no text"),
        ("a.txt", b"Too short.", "no text of at least 8 words"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named) as error:
        Decontaminator(DecontaminationSettings(files=(str(tmp_path / name),)))
    assert str(tmp_path / name) in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    for file in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=str(file)):
            Decontaminator(DecontaminationSettings(files=(str(file),)))


@pytest.mark.parametrize(
    "values", [{"files": ["a"]}, {"files": "a"}, {"ngram": 0}, {"shortest": 14}, {"overlap": 0}, {"enabled": "yes"}]
)
def test_settings_are_checked(values):
    with pytest.raises(UserError, match=f"decontamination: {next(iter(values))}"):
        DecontaminationSettings(**values)


def test_many_files_take_the_memory_that_is_said(tmp_path):
    lines = io.StringIO()
    for i in range(3000):
        lines.write(" ".join(f"w{i * j % 9973}" for j in range(1, 60)) + "\n")
    (tmp_path / "a.txt").write_text(lines.getvalue())
    found = Decontaminator(DecontaminationSettings(files=(str(tmp_path / "a.txt"),)))
    assert len(found) > 100_000
    assert len(pickle.dumps(found)) < 27 * len(found)
