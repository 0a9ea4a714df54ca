"""Text files and folders as people name them."""

from __future__ import annotations

import codecs
import gzip
import os
import socket
import tempfile
import zipfile

import pytest

from fastllm.data.readers import ReaderOptions, Seen, open_source, streams
from fastllm.errors import UserError

from .reading import PAGE, Read, read, record, response

TEXT = "some text of a few words\n" * 40


def error_of(path: object) -> str:
    with pytest.raises(UserError) as error:
        read(path)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("block", [7, 2**20])
def test_a_file_of_one_document(block, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "OUT", block)
    path = tmp_path / "notes"
    path.write_bytes(codecs.BOM_UTF8 + "né日本😀\r\n\0\ufeff".encode() * 50)
    found = read(path)
    assert found.texts == ["né日本😀\r\n\0\ufeff" * 50]
    document = found.documents[0]
    assert (document.kind, document.id, document.metadata, document.source) == ("text", "0", {}, str(path))
    path.rename(tmp_path / "a.py")
    assert read(tmp_path / "a.py").documents[0].kind == "code"
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed") + gzip.compress(b" text"))
    assert read(tmp_path / "b.txt.gz").texts == ["packed text"]


def test_a_long_file_becomes_documents_of_a_group(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * (20 + i % 13) + "\n\n" for i in range(2000)]
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text("".join(paragraphs))
    (tmp_path / "c.txt").write_text("".join(paragraphs) + "x")
    found = [read(tmp_path / name, ReaderOptions(document=4000)) for name in ("a.txt", "b.md", "c.txt")]
    assert "".join(found[0].texts) == "".join(paragraphs)
    assert all(text.startswith("Paragraph") and len(text) <= 4000 for text in found[0].texts)
    assert [d.id for d in found[0].documents[:3]] == ["0/0", "0/1", "0/2"]
    (group,) = {d.metadata["group"] for d in found[0].documents}
    assert len(group) == 16 and int(group, 16)
    assert {d.metadata["group"] for d in found[1].documents} == {group}  # by the content
    assert {d.metadata["group"] for d in found[2].documents} != {group}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_named(encoding, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"is {name} text: convert it to UTF-8" in error_of(path)
    (tmp_path / "b.txt").write_text(TEXT)
    seen = Seen()
    assert read(tmp_path, seen=seen).texts == [TEXT]
    assert str(seen.left_out) == f"{name} text (1: {path})"


def test_what_is_no_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(5000))
    assert "is not text: it has more zero bytes" in error_of(path)
    path.write_bytes(b"")
    assert "is empty" in error_of(path)
    path.write_bytes(codecs.BOM_UTF8 + b" \n")
    assert "is empty" in error_of(path)
    path.write_bytes(codecs.BOM_UTF8 + b"text \xff")
    assert "is not UTF-8 text: byte 8" in error_of(path)
    path.write_bytes(b"text" * 100_000 + b"\xe6\x97")
    assert "is not UTF-8 text: byte 400,000" in error_of(path)
    monkeypatch.setattr(streams, "OUT", 7)
    path.write_bytes(codecs.BOM_UTF8 + "né日本😀".encode() * 50 + b"\xe6\x97" + b"x")
    assert f"byte {3 + 50 * 13}" in error_of(path)
    (tmp_path / "b.txt").write_text(TEXT)
    found = read(tmp_path)  # of a folder's files it is a problem of one of them
    assert found.texts == [TEXT]
    assert found.problems[0][0] == f"byte {3 + 50 * 13}"


def test_what_is_no_regular_file(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "up").symlink_to(".")
    (tmp_path / "dir.txt").symlink_to(tmp_path)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:  # a socket's path is short
        listener.bind(f"{short}/socket.txt")
        assert "is a socket" in error_of(f"{short}/socket.txt")
    assert "is a named pipe" in error_of(tmp_path / "pipe.txt")
    assert "is a device" in error_of("/dev/zero")
    assert "is a device" in error_of(tmp_path / "zero.txt")
    assert "symbolic links" in error_of(tmp_path / "loop.txt")
    assert "No such file" in error_of(tmp_path / "gone.txt")
    seen = Seen()
    names = (tmp_path / "a.txt", tmp_path / ".." / tmp_path.name, tmp_path / "a.txt")
    assert [text for name in names for text in read(name, seen=seen).texts] == [TEXT]
    for words in ("links to folders (2", "a named pipe (1:", "a device (1:", "files that can't be read (2"):
        assert words in str(seen.left_out)


def test_files_of_the_same_content_count_once(tmp_path):
    for name in ("a.txt", "b.md", "c/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "e.txt").write_text(TEXT.upper())  # of the same size
    os.link(tmp_path / "a.txt", tmp_path / "f.txt")
    assert sorted(read(tmp_path).texts) == [TEXT.upper(), TEXT]


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "no\nsuch\x1b[31m", "\ud800", "no\udcff"])
def test_names_that_no_file_has(path):
    error_of(path)


def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"b\xff\n'\".txt")
    path.write_text(TEXT)
    (document,) = read(path).documents
    assert document.source.endswith("b\\xff\\n'\".txt") and document.source.isprintable()
    assert read(tmp_path).texts == [TEXT]


def test_unreadable_files_and_folders(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT)
    scan, opened = os.scandir, os.open

    def refuse(call):
        def refusing(path, *args):
            if str(path).endswith(("in", "b.txt")):
                raise PermissionError(13, "Permission denied")
            return call(path, *args)

        return refusing

    monkeypatch.setattr(os, "scandir", refuse(scan))
    monkeypatch.setattr(os, "open", refuse(opened))
    seen = Seen()
    assert read(tmp_path, seen=seen).texts == [TEXT]
    assert "folders that can't be read (1" in str(seen.left_out)
    assert "files that can't be read (1" in str(seen.left_out)
    assert "Permission denied" in error_of(tmp_path / "b.txt")


def test_a_file_that_goes_away(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (source,) = open_source(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").unlink()
    found = Read()
    assert list(source.records(found)) == []
    assert found.problems == [("the file", "it can't be read: No such file or directory")]


def test_run_and_model_folders_are_left_out(tmp_path):
    for name in ("notes.txt", "in/model/config.json", "in/model/model.safetensors", ".git/a.txt", "lib/pyvenv.cfg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(TEXT if name == "notes.txt" else f"{name} is no text to train on")
    seen = Seen()
    assert read(tmp_path, seen=seen).texts == [TEXT]
    for words in (
        f"run or model folders (1: {tmp_path / 'in' / 'model'})",
        "hidden folders (1:",
        "installed or cached",
    ):
        assert words in str(seen.left_out)
    assert "is a run or model folder" in error_of(tmp_path / "in" / "model")
    (tmp_path / "empty").mkdir()
    assert "has no files that can be read" in error_of(tmp_path / "empty")


def test_formats_in_a_folder(tmp_path):
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(record(response(PAGE.format("lake").encode()))))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "c.jsonl").write_text('{"body": "no text of this name"}\n')
    (tmp_path / "d.json").write_text('{\n"text": "pretty"\n}\n')
    (tmp_path / "e.py").write_text("x = '*** START OF THE PROJECT GUTENBERG EBOOK'\n")
    (tmp_path / "f.bin.gz").write_bytes(gzip.compress(b"something else"))
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (tmp_path / "h.png").write_bytes(b"\x89PNG")
    with zipfile.ZipFile(tmp_path / "i.epub", "w") as file:
        file.writestr("a.txt", "text")
    seen = Seen()
    found = read(tmp_path, seen=seen)
    assert found.formats == ["warc", "jsonl", "text", "text", "text", "text"]
    assert [d.kind for d in found.documents] == ["web", "table", "table", "text", "text", "code", "text"]
    assert "a zip file" in str(seen.left_out) and "compressed, and not of a known format" in str(seen.left_out)


def test_damage_keeps_what_came_before(tmp_path):
    data = gzip.compress(os.urandom(100_000).hex().encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data[: len(data) // 2])
    found = read(path)
    assert 50_000 < len(found.texts[0]) < 150_000
    assert found.problems == [("byte 0", "the file ends inside the gzip member that begins here")]
