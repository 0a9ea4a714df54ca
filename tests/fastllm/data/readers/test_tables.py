"""JSON lines, Parquet files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import bz2
import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fastllm.data.readers import ReaderOptions, jsonl, parquet
from fastllm.errors import UserError

from .reading import read

ROWS = [
    {"text": "One é", "url": "http://x/1", "title": "T", "date": "2024-01-02", "language": "en", "score": 1},
    {"text": "Two", "timestamp": "2024"},
    {"text": ""},
    {"text": None},
    {"text": "Half \ud83d pair"},
]
TEXTS = ["One é", "Two", "Half \ufffd pair"]


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress, bz2.compress])
def test_lines(compress, tmp_path):
    data = lines()
    path = tmp_path / "odd name"
    path.write_bytes(compress(data[:100]) + compress(data[100:]))
    found = read(path)
    assert found.formats == ["jsonl"]
    assert found.texts == TEXTS
    assert found.documents[0].metadata == {"url": "http://x/1", "title": "T", "date": "2024-01-02", "language": "en"}
    assert found.documents[1].metadata == {"date": "2024"}
    assert [d.id for d in found.documents] == ["1", "2", "5"] and found.documents[0].kind == "table"
    assert found.passed_over == {"no text": 2}
    assert not found.problems


def test_another_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "x", "id": 1}\n')
    assert read(path, ReaderOptions(text_column="content")).texts == ["x"]
    with pytest.raises(UserError, match=r"a\.jsonl has no text 'text' in its first line: its keys are content, id"):
        read(path)


def test_bad_lines_are_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "TEXT_LIMIT", 200_000)
    good = b'{"text": "good"}\n'
    bad = [
        b'{"text": "cut\n',
        b'{"text": "not \xff UTF-8"}\n',
        b"[1, 2]\n",
        b'{"text": 7}\n',
        b'{"other": "x"}\n',
        b'{"text": ' + b"[" * 100_000 + b"]" * 50_000 + b"}\n",
        b'{"text": "' + b"x" * 300_000 + b'"}\n',
        b'{"text": ' + b"9" * 10_000 + b"}\n",
        b"\0\0\0\n",
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + b"".join(line + good for line in bad) + b"\n  \n" + good[:-1])
    found = read(path)
    assert found.texts == ["good"] * (len(bad) + 2)
    offset, places = len(good), []
    for i, line in enumerate(bad):
        places.append(f"line {2 * i + 2:,}, byte {offset:,}")
        offset += len(line) + len(good)
    assert sorted(where for where, _ in found.problems) == sorted(places)
    assert "the line has 300,012 bytes: more than 200,000" in [message for _, message in found.problems]


def test_a_very_long_line_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "last"}\n')
    found = read(path)
    assert found.texts == ["first", "last"]
    assert found.problems == [("line 2, byte 18", f"the line has {100 * 2**20 + 12:,} bytes: more than {2**26:,}")]


def test_damage_costs_the_lines_around_it(tmp_path):
    members = [gzip.compress(b"".join(b'{"text": "%d-%d"}\n' % (n, i) for i in range(500))) for n in range(3)]
    damaged = bytearray(members[1])
    damaged[len(damaged) // 2] ^= 0xFF
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(members[0] + damaged + members[2])
    found = read(path)
    assert {f"{n}-{i}" for n in (0, 2) for i in range(1, 500)} <= set(found.texts)
    assert found.problems[0][0] == f"byte {len(members[0]):,}"
    assert "the damage cut this line" in found.problems[1][1]
    path.write_bytes(members[0][:-100])
    found = read(path)
    assert found.texts and all(text.startswith("0-") for text in found.texts)
    assert found.problems == [("byte 0", "the file ends inside the gzip member that begins here")]


# ---- Parquet ----


def table(n: int = 300) -> pa.Table:
    texts = [f"Text {i}" if i % 7 else None for i in range(n)]
    return pa.table({"text": texts, "url": [f"http://x/{i}" for i in range(n)], "n": list(range(n))})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_rows(kind, compression, tmp_path):
    path = tmp_path / "odd name"
    rows = table()
    texts = rows["text"].combine_chunks()
    texts = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    pq.write_table(rows.set_column(0, "text", texts), path, row_group_size=100, compression=compression)
    found = read(path)
    assert found.formats == ["parquet"]
    assert found.texts == [f"Text {i}" for i in range(300) if i % 7]
    assert found.documents[-1].metadata == {"url": "http://x/299"} and found.documents[-1].id == "299"
    assert found.passed_over == {"no text": 43}


def test_a_column_that_is_not_there(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path)
    with pytest.raises(UserError, match=r"a\.parquet has no column 'body': its columns are text, url, n; name the one"):
        read(path, ReaderOptions(text_column="body"))
    with pytest.raises(UserError, match="holds no text in 'n', but int64"):
        read(path, ReaderOptions(text_column="n"))


def test_damaged_parquet_files(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, row_group_size=100, compression="zstd", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"is no Parquet file, or damaged"):
        read(path)
    path.write_bytes(whole)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    damaged = bytearray(whole)
    start = column.data_page_offset + 30
    damaged[start : start + 200] = bytes(200)
    path.write_bytes(damaged)
    found = read(path)
    assert [int(d.id) for d in found.documents] == [i for i in range(300) if i % 7 and not 100 <= i < 200]
    assert found.problems[0][0] == "row 100 (group 1)"


def test_a_long_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "TEXT_LIMIT", 1000)
    pq.write_table(pa.table({"text": ["a", "x" * 2000, "b"]}), tmp_path / "a")
    found = read(tmp_path / "a")
    assert found.texts == ["a", "b"]
    assert found.problems == [("row 1", "text of more than 0 MiB")]


# ---- the hub ----


def test_data_sets_need_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs datasets: pip install datasets"):
        read("hf:owner/name")


def test_a_data_set(monkeypatch):
    """A stand-in for the library, which needs the network."""
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        yield {"text": "One", "url": "http://x", "n": 1}
        yield {"text": ""}
        raise ConnectionError("the network\nis gone")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = read("hf:owner/name/config:train[:10%]")
    assert found.texts == ["One"]
    assert asked == [("owner/name", "config", "train[:10%]", True)]
    assert found.problems == [("row 1", "the network is gone; what follows is left out")]
    assert found.documents[0].source == "hf:owner/name/config:train[:10%]"
    read("hf:name")
    assert asked[-1] == ("name", None, "train", True)
    with pytest.raises(UserError, match="names no data set"):
        read("hf:a/b/c/d")
