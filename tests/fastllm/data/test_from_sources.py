"""Files and folders as people name them."""

from __future__ import annotations

import codecs
import json.decoder
import os
import socket
import tempfile
from pathlib import Path

import pytest

from fastllm.data import from_sources
from fastllm.data.readers import ReaderOptions, Seen, streams
from fastllm.errors import UserError

TEXT = "some text of a few words\n" * 40


class Read:
    """The documents of what the user names, and what is left out."""

    def __init__(self, paths: list[Path | str], document: int = 2**14) -> None:
        seen, options = Seen(), ReaderOptions(document=document)
        named = [str(path) for path in paths]
        files = from_sources._files(named, options, seen) if paths else from_sources._standard_library(options, seen)
        found = [document for _, document in from_sources._documents(files)]
        self.documents = [document.text for document in found]
        self.groups = [document.metadata.get("group") for document in found]
        self.note = str(seen.left_out)

    @property
    def text(self) -> str:
        return "".join(sorted(self.documents))


def error_of(path: object) -> str:
    with pytest.raises(UserError) as error:
        Read([path])  # type: ignore[list-item]
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ("config.toml", "run.json", "tokenizer.json", "log.jsonl", "sample.txt", "checkpoints/step-1/checkpoint.json"),
        ("config.toml", "tokenizer.json", "run.json"),
        ("config.json", "model.safetensors", "README.md"),
        ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
        ("adapter_config.json", "adapter_model.safetensors", "README.md"),
    ],
)
def test_run_and_model_folders_are_left_out(names, tmp_path):
    for name in ("notes.txt", *(f"in/model/{name}" for name in names)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(TEXT if name == "notes.txt" else f"{name} is no text to train on")
    corpus = Read([tmp_path])
    assert corpus.text.count("some") == 40
    assert "no text" not in corpus.text
    assert corpus.note == f"run or model folders (1: {tmp_path / 'in' / 'model'})"
    message = error_of(tmp_path / "in" / "model")
    assert "is a run or model folder" in message
    assert sum(name in message for name in names) >= 2  # by what it was recognised


def test_hidden_folders_and_caches_are_left_out(tmp_path):
    for folder in (".git", ".venv/lib", "env/lib", "node_modules/x", "__pycache__", "target", "lib/site-packages/y"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("not mine")
    (tmp_path / "env" / "pyvenv.cfg").write_text("not mine")
    (tmp_path / "target" / "CACHEDIR.TAG").write_text("not mine")
    (tmp_path / "lib" / "mine.py").write_text(TEXT)
    (tmp_path / ".hidden.txt").write_text("not mine")
    corpus = Read([tmp_path])
    assert corpus.text.count("some") == 40
    assert "not mine" not in corpus.text
    assert "hidden folders (2, such as" in corpus.note
    assert "folders of installed or cached files (5, such as" in corpus.note
    assert Read([tmp_path / ".git"]).text == "not mine"  # by its name


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
    corpus = Read([tmp_path / "a.txt", tmp_path / ".." / tmp_path.name, tmp_path / "a.txt"])
    assert corpus.text.count("some") == 40  # once
    for words in ("links to folders (2", "a named pipe (1:", "a device (1:", "files that can't be read (2"):
        assert words in corpus.note


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "no\nsuch\x1b[31m", "\ud800", "no\udcff"])
def test_names_that_no_file_has(path):
    error_of(path)


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
    note = Read([tmp_path]).note
    assert "folders that can't be read (1" in note
    assert "files that can't be read (1" in note
    assert "Permission denied" in error_of(tmp_path / "b.txt")


def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"b\xff\n'\".txt")
    path.write_text(TEXT)
    corpus = Read([path])
    assert corpus.text.count("some") == 40
    assert Read([tmp_path]).text.count("some") == 40


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + TEXT.encode() + "\ufeffin the midst, and a \0".encode())
    corpus = Read([path])
    assert len(corpus.text) == len(TEXT) + len("\ufeffin the midst, and a \0")
    path.write_bytes(codecs.BOM_UTF8)
    assert "is empty" in error_of(path)
    path.write_bytes(codecs.BOM_UTF8 + b"text \xff")
    assert "not UTF-8 text: byte 8" in error_of(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_named(encoding, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"is {name} text: convert it to UTF-8" in error_of(path)
    (tmp_path / "b.txt").write_text(TEXT)
    assert Read([tmp_path]).note == f"{name} text (1: {path})"


def test_zero_bytes_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(5000))
    assert "is not text" in error_of(tmp_path / "a.txt")


def test_the_byte_of_an_error_far_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 7)
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + "né日本😀".encode() * 50 + b"\xe6\x97" + b"x")
    assert f"byte {3 + 50 * 13}" in error_of(path)
    path.write_bytes(codecs.BOM_UTF8 + "né日本😀".encode() * 50)
    assert len(Read([path]).text) == 50 * 5


def test_a_long_file_becomes_documents(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}. " + "word " * (20 + i % 13) + "\n\n" for i in range(2000)]
    path.write_text("".join(paragraphs))
    corpus = Read([path], 4000)
    assert len(corpus.documents) > 40
    assert "".join(corpus.documents) == "".join(paragraphs)
    assert all(text.startswith("Paragraph") and len(text) <= 4000 for text in corpus.documents)
    for copy in ("x.txt", "y.txt"):  # the same for any number and place of the files
        (tmp_path / copy).write_text("".join(paragraphs))
    again = Read([tmp_path / "y.txt", tmp_path], 4000)
    assert again.documents == corpus.documents
    assert again.groups == corpus.groups
    assert len(set(again.groups)) == 1


def test_text_that_repeats_itself_is_not_lost(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello world\n" * 20_000)
    corpus = Read([path])
    assert len(corpus.text) == 240_000


def test_folders_are_read_recursively_and_binary_files_in_them_skipped(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text("first text")
    (tmp_path / "in" / "b.md").write_bytes(b"second\r\ntext")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    corpus = Read([tmp_path])
    assert corpus.text == "first textsecond\r\ntext"
    assert "c.txt" in corpus.note


def test_the_standard_library_without_its_tests():
    corpus = Read([])
    assert len(corpus.documents) > 300
    assert Path(json.decoder.__file__).read_text("utf-8") in corpus.documents


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b" \n\t ", "empty"),
        (b"text \xff\xfe", "not UTF-8 text: byte 5"),
    ],
)
def test_a_named_file_that_is_no_text(content, words, tmp_path):
    path = tmp_path / "named.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        Read([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_without_text(tmp_path):
    with pytest.raises(UserError, match="no files that can be read"):
        Read([tmp_path])
    (tmp_path / "a.txt").write_text("")
    assert not Read([tmp_path]).documents
