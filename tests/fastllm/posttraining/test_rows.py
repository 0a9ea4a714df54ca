"""Files of rows, lines that can't be used, and the report."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import os
import tracemalloc
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fastllm.data import chat_template
from fastllm.errors import UserError
from fastllm.posttraining import conversations as c
from fastllm.posttraining import rows
from fastllm.posttraining.conversations import read_conversations, read_prompts
from fastllm.posttraining.rows import Report, Row, read_rows

from .row_files import CHAT, WEATHER, dropped, one, read, turns, written

# ---- files ----


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe2\x80\xa8"}\n{"a": null}')
    found, report = read(read_rows, path)
    assert found == [("a.jsonl:1", {"a": 1}), ("a.jsonl:4", {"a": "\u2028"}), ("a.jsonl:5", {"a": None})]
    assert isinstance(found[0], Row) and report.read == 3 and not report.lines()


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress), (".bz2", bz2.compress)],
)
def test_compressed_lines(suffix, compress, end, tmp_path):
    path = tmp_path / f"a.jsonl{suffix}"
    data = f'{{"a": 1}}\n{{"a": 2}}{end}'.encode()
    path.write_bytes(compress(data[:3]) + compress(data[3:]))
    assert read(read_rows, path)[0] == [(f"{path.name}:1", {"a": 1}), (f"{path.name}:2", {"a": 2})]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_json_list(compress, tmp_path):
    path = tmp_path / ("a.json" if compress is bytes else "a.json.gz")
    path.write_bytes(compress(b'\xef\xbb\xbf\n [{"a": 1},\n 7, {"a": 1, "a": 2}, {"a": "\\ud800"}, {"a": 2}]'))
    found, report = read(read_rows, path)
    assert found == [(f"{path.name}[0]", {"a": 1}), (f"{path.name}[4]", {"a": 2})]
    assert dropped(report) == {
        rows.NOT_OBJECT: [f"{path.name}[1]: 7"],
        rows.KEY_TWICE: [f"{path.name}[2]: 'a'"],
        rows.SURROGATE: [f"{path.name}[3]"],
    }


def test_json_file_of_lines(tmp_path):
    path = written(tmp_path / "a.json", {"a": 1}, {"a": 2})
    assert [row.where for row in read(read_rows, path)[0]] == ["a.json:1", "a.json:2"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b"{", rows.NOT_JSON, "Expecting property name enclosed in double quotes at character 1"),
        (b'{"a": 1} x', rows.NOT_JSON, "Extra data at character 9"),
        (b"[1]", rows.NOT_OBJECT, "[1]"),
        (b"null", rows.NOT_OBJECT, "None"),
        (b'{"a": "\xff"}', rows.NOT_UTF8, "byte 7"),
        ('{"a": 1}'.encode("utf-16"), rows.NOT_UTF8, "byte 0"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, rows.TOO_DEEP, ""),
        (b'{"a": ' + b"[" * 100_000, rows.TOO_DEEP, ""),
        (b'{"a": ["\\ud83d"]}', rows.SURROGATE, ""),
        (b'{"\\udc00": 1}', rows.SURROGATE, ""),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', rows.KEY_TWICE, "'c'"),
        (b"x" * 1001, rows.UNREADABLE, "the line has 1,001 bytes: more than 1,000"),
    ],
)
def test_bad_lines_are_named(line, reason, detail, tmp_path, monkeypatch):
    if reason == rows.UNREADABLE:
        monkeypatch.setattr(rows, "TEXT_LIMIT", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    found, report = read(read_rows, path)
    assert [row.where for row in found] == ["a.jsonl:1", "a.jsonl:3"]
    assert dropped(report) == {reason: [f"a.jsonl:2: {detail}" if detail else "a.jsonl:2"]}


def test_depth_that_templates_take(tmp_path):
    value: object = 1
    for _ in range(chat_template.DEPTH):
        value = [value]
    assert len(read(read_rows, written(tmp_path / "a.jsonl", {"a": value[0]}))[0]) == 1
    assert not read(read_rows, written(tmp_path / "a.jsonl", {"a": value}))[0]


def test_long_numbers_are_not_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": ' + "1" * 5000 + "}\n")
    assert read(read_rows, path)[1].dropped[rows.NOT_JSON].first[0][0] == "a.jsonl:1"


def test_pairs_of_surrogates_are_text(tmp_path):
    assert one(read_rows, tmp_path, {"a": "\U0001f600"}).values == {"a": "\U0001f600"}


def test_line_numbers_have_no_commas(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "TEXT_LIMIT", 10)
    path = tmp_path / "a.jsonl"
    path.write_text("\n" * 1233 + "x" * 11)
    assert read(read_rows, path)[1].dropped[rows.UNREADABLE].first[0][0] == "a.jsonl:1234"


def test_truncated_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 3 + os.urandom(1000))[:-500])
    found, report = read(read_rows, path)
    assert len(found) == 3
    assert report.dropped[rows.UNREADABLE].count == 1 and "ends inside the gzip member" in report.lines()[0]


def test_lines_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((b'{"a": "' + b"x" * 2000 + b'"}\n') * 5000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path, Report())) == 5000
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_parquet_with_nested_messages(tmp_path):
    path = tmp_path / "a.parquet"
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    table = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "weight": 0}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]},
        {"messages": None},
    ]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=2)
    found, report = read(read_conversations, path)
    assert [f.messages for f in found] == [[CHAT[0], WEATHER], [CHAT[0], {**CHAT[1], "weight": 0}]]
    assert [f.where for f in found] == ["a.parquet row 0", "a.parquet row 1"]
    assert dropped(report) == {
        c.NO_TEXT: ["a.parquet row 2: None"],
        c.UNRECOGNISED: ["a.parquet row 3: its keys are messages"],
    }


def test_parquet_values_become_json(tmp_path):
    path = tmp_path / "a.parquet"
    day, price = datetime.date(2024, 1, 2), Decimal("1.50")
    columns = {"prompt": [b"hi", b"\xff"], "day": [day, day], "price": [price, price], "none": [None, 1]}
    pq.write_table(pa.table(columns), path)
    found, report = read(read_prompts, path)
    assert [f.messages for f in found] == [turns("u hi")]
    assert found[0].row == {"day": "2024-01-02", "price": "1.50", "none": None}
    assert dropped(report) == {rows.NOT_UTF8: ["a.parquet row 1: byte 0 of a value"]}


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [os.urandom(500).hex() for _ in range(300)]
    pq.write_table(pa.table({"prompt": texts}), path, row_group_size=100, use_dictionary=False, compression="gzip")
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 2000] = bytes(2000)
    path.write_bytes(content)
    found, report = read(read_prompts, path)
    assert len(found) == 200 and found[100].where == "a.parquet row 200"
    assert report.dropped[rows.UNREADABLE].count == 100
    assert report.dropped[rows.UNREADABLE].first[0][0] == "a.parquet row 100"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"a\.parquet is no Parquet file, or damaged"):
        list(read_rows(path, Report()))


def test_folder(tmp_path):
    folder = tmp_path / "data"
    for name in ("b.jsonl", "a.jsonl", "inner/a.jsonl", ".hidden/a.jsonl", "notes.txt", "x.csv.gz"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        written(folder / name, {"a": 1})
    found, report = read(read_rows, folder)
    assert [row.where for row in found] == ["data/a.jsonl:1", "data/b.jsonl:1", "data/inner/a.jsonl:1"]
    assert report.notes[rows.LEFT_OUT].count == 1 and "hidden folders" in report.lines()[0]


def test_unusable_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    for name, suffix in (("a", ""), ("a.txt", ""), ("a.csv", ""), ("a.parquet.gz", "")):
        (tmp_path / name).write_text(suffix)
    errors = {
        "absent.jsonl": r"can't read the data file .*absent\.jsonl: No such file",
        "pipe.jsonl": "it is a pipe",
        "empty": r"the folder .*empty has no files of rows: \.jsonl, \.json or \.parquet",
        "a": r"the data file .*a is of no known kind: \.jsonl, \.json or \.parquet",
        "a.txt": "is of no known kind",
        "a.csv": "is of no known kind",
        "a.parquet.gz": "is of no known kind",
        "a\0.jsonl": "can't read the data file",
    }
    for name, error in errors.items():
        with pytest.raises(UserError, match=error):
            list(read_rows(tmp_path / name, Report()))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'[{"a": 1}', r"is not JSON: Expecting ',' delimiter at character 9"),
        (b'[{"a": "\xff"}]', "is not UTF-8: byte 8"),
        (b"[" * 100_000, "is nested too deep"),
        (b"[1] [2]", "is not JSON: Extra data"),
        (gzip.compress(b"[" + b"1," * 10_000)[:-8], "is damaged"),
        (b"[" + b"1," * 1000, r"is a list of more than 1,000 bytes: make JSON lines of it"),
    ],
)
def test_bad_lists_are_errors(content, error, tmp_path, monkeypatch):
    if len(content) == 2001:
        monkeypatch.setattr(rows, "LIST_LIMIT", 1000)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=error):
        list(read_rows(tmp_path / "a.json", Report()))


# ---- the report ----


def test_report():
    report = Report()
    report.read = 1200
    for line in range(1, 5):
        report.drop(f"a.jsonl:{line}", "empty")
    report.drop("a.jsonl:7", "unknown role", "'bot'")
    report.note("a.jsonl:9", "cut")
    report.keep()
    assert report.lines() == [
        "dropped 5 of 1,200: 4 empty (a.jsonl:1, a.jsonl:2, a.jsonl:3, …), 1 unknown role (a.jsonl:7: 'bot')",
        "1 cut (a.jsonl:9)",
    ]
    assert json.loads(json.dumps(report.as_dict())) == {
        "read": 1200,
        "kept": 1,
        "dropped": {
            "empty": {"count": 4, "first": ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]},
            "unknown role": {"count": 1, "first": ["a.jsonl:7: 'bot'"]},
        },
        "notes": {"cut": {"count": 1, "first": ["a.jsonl:9"]}},
    }
    report.require_any(["a.jsonl"])


def test_nothing_left(tmp_path):
    path = written(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"nothing is left of .*a\.jsonl, b: there are no rows"):
        read(read_rows, path)[1].require_any([path, "b"])
    _, report = read(read_conversations, written(path, {"messages": []}, {}))
    with pytest.raises(
        UserError, match=r"left of x: dropped 2 of 2: 1 no turns \(a.jsonl:1\), 1 row of no known form \("
    ):
        report.require_any(["x"])
