"""From what the user names to the tokens of a run."""

from __future__ import annotations

import codecs
import json
import json.decoder
from pathlib import Path

import pytest

from fastllm.data import from_sources, read_corpus
from fastllm.data.cleaning import FILTERS
from fastllm.data.corpus.prepare import prepare
from fastllm.data.corpus.recipe import Recipe, SourceSpec
from fastllm.data.readers import ReaderOptions, Seen, streams
from fastllm.data.token_shards import TokenFolder
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


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + TEXT.encode() + "\ufeffin the midst, and a \0".encode())
    corpus = Read([path])
    assert len(corpus.text) == len(TEXT) + len("\ufeffin the midst, and a \0")
    path.write_bytes(codecs.BOM_UTF8)
    assert "is empty" in error_of(path)
    path.write_bytes(codecs.BOM_UTF8 + b"text \xff")
    assert "not UTF-8 text: byte 8" in error_of(path)


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


def test_text_becomes_tokens_of_what_the_user_named(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("first text of the notes\n" * 50)
    (tmp_path / "b.txt").write_text("another text\n" * 50)
    paths = [str(tmp_path / "notes"), str(tmp_path / "b.txt")]
    folder = TokenFolder(from_sources.make_tokens(paths, 300, 1000, tmp_path))
    assert folder.sources == paths
    assert folder.documents >= 2
    decoded = folder.tokenizer.decode(folder.read(0, int(folder.lengths[0]) - 1))
    assert (tmp_path / "notes" / "a.txt").read_text().startswith(decoded)
    assert "documents" in capsys.readouterr().out


def test_a_table_becomes_a_corpus_first(tmp_path, capsys):
    lines = [json.dumps({"text": f"The text number {n} has {n * 7} words and more of it.\n" * 20}) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{damaged"]) + "\n")
    with pytest.raises(UserError, match="the filters keep no document"):  # which repeat their lines
        from_sources.make_tokens([str(tmp_path / "a.jsonl")], 300, 1000, tmp_path / "none")
    assert (tmp_path / "none" / "corpus" / "report.md").exists()
    recipe = Recipe((SourceSpec(str(tmp_path / "a.jsonl"), "mine", 2.0),)).without(tuple(FILTERS))
    prepare(recipe, tmp_path / "corpus", 1)
    folder = TokenFolder(from_sources.make_tokens([str(tmp_path / "corpus")], 300, 1000, tmp_path / "run"))
    assert folder.sources == ["mine"] and folder.weights == {"mine": 2.0}
    assert folder.documents == len(list(read_corpus(tmp_path / "corpus"))) > 10
    with pytest.raises(UserError, match="give one corpus alone"):
        from_sources.make_tokens([str(tmp_path / "corpus"), str(tmp_path / "a.jsonl")], 300, 1000, tmp_path / "run2")
