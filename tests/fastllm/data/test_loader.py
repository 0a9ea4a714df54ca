from __future__ import annotations

import json.decoder
from pathlib import Path

import numpy as np
import pytest
import torch

from fastllm.data import loader, sources
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError

DOCUMENTS = [f"document {i} " + "word " * (50 + i % 30) for i in range(100)]


FILES = [[document] for document in DOCUMENTS]


def test_split_is_disjoint_whole_and_independent_of_the_order():
    train, validation = sources.split(FILES, 0.1)
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert 0.05 < sum(map(len, validation)) / sum(map(len, DOCUMENTS)) <= 0.1
    assert sources.split(FILES[::-1], 0.1) == (train, validation)


def test_no_file_is_in_both_splits():
    files = [[f"{i}, part {k} " * 10 for k in range(5)] for i in range(60)]
    train, validation = sources.split(files, 0.1)
    assert 0.05 < len(validation) / 300 <= 0.1
    assert not {text.split(",")[0] for text in train} & {text.split(",")[0] for text in validation}


def test_split_of_one_file_of_many_documents():
    """Documents of it, and those for training in their order. Equal ones are in the same split."""
    train, validation = sources.split([DOCUMENTS * 3], 0.1)
    assert sorted(train + validation) == sorted(DOCUMENTS * 3)
    assert not set(train) & set(validation)
    assert train == [document for document in DOCUMENTS * 3 if document not in validation]
    assert 0.05 < sum(map(len, validation)) / sum(map(len, DOCUMENTS * 3)) <= 0.1


def test_split_of_one_document_holds_out_its_tail():
    text = "".join(DOCUMENTS)
    train, validation = sources.split([[text]], 0.1)
    assert train + validation == [text[: len(train[0])], text[len(train[0]) :]]
    assert 0 <= len(validation[0]) - 0.1 * len(text) < len("document ")  # whole words


def test_split_of_equal_documents_parts_them():
    """There is no other way."""
    train, validation = sources.split([["same"] * 100], 0.1)
    assert len(train) + len(validation) == 100
    assert 5 <= len(validation) <= 10


def test_split_of_unequal_files_holds_out_enough():
    train, validation = sources.split([["a" * 100_000], ["short"]], 0.1)
    assert sum(map(len, validation)) == pytest.approx(10_000, rel=0.01)
    assert sum(map(len, train)) == pytest.approx(90_000, rel=0.01)


def test_folders_are_read_recursively_and_binary_files_in_them_skipped(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text("first text")
    (tmp_path / "in" / "b.md").write_bytes(b"second\r\ntext")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    corpus = sources.load_corpus([tmp_path], 0.3)
    assert corpus.size == len("first text") + len("second\r\ntext")
    assert len(corpus.notes) == 1
    assert "c.txt" in corpus.notes[0]


def test_the_standard_library_without_its_tests():
    corpus = sources.load_corpus([], 0.05)
    documents = corpus.train + corpus.validation
    assert len(documents) > 300
    assert 0.03 < sum(map(len, corpus.validation)) / corpus.size <= 0.05
    assert Path(json.decoder.__file__).read_text("utf-8") in documents


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
        sources.load_corpus([path], 0.05)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_without_text(tmp_path):
    with pytest.raises(UserError, match="no text files"):
        sources.load_corpus([tmp_path], 0.05)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="no text"):
        sources.load_corpus([tmp_path], 0.05)


def test_encode_puts_the_end_token_before_and_after_each_document():
    tokenizer = Tokenizer.train(DOCUMENTS, 300)
    row = loader.encode_documents(tokenizer, DOCUMENTS)
    assert row.dtype == np.uint16
    eos = tokenizer.eos_id
    assert [eos, *(i for d in DOCUMENTS for i in (*tokenizer.encode(d), eos))] == row.tolist()
    assert (row[1:] == eos).sum() == len(DOCUMENTS)  # targets
    assert loader.encode_documents(tokenizer, []).tolist() == [eos]


@pytest.mark.parametrize("length", [17, 18, 33, 1000, 1001])
def test_token_dataset(length):
    tokens = np.arange(length, dtype=np.uint16)
    dataset = loader.TokenDataset(tokens, 16, seed=3)
    inputs, targets = dataset.batch(0, dataset.windows).values()  # an epoch
    assert inputs.shape == targets.shape == (dataset.windows, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert len(inputs.unique()) == inputs.numel()  # nothing twice
    assert inputs.numel() >= length - 3 * 16
    again = loader.TokenDataset(tokens, 16, seed=3)
    for first in range(0, 3 * dataset.windows, 7):  # any order of asking gives the same
        expected = loader.TokenDataset(tokens, 16, seed=3).batch(first, 5)
        assert all(torch.equal(again.batch(first, 5)[name], tensor) for name, tensor in expected.items())


def test_epochs_and_seeds_differ():
    tokens = np.arange(10_000, dtype=np.uint16)
    dataset = loader.TokenDataset(tokens, 16, seed=0)
    first, second = dataset.batch(0, 50)["tokens"], dataset.batch(dataset.windows, 50)["tokens"]
    assert not torch.equal(first, second)
    assert not torch.equal(first, loader.TokenDataset(tokens, 16, seed=1).batch(0, 50)["tokens"])


def test_a_dataset_recognises_its_state():
    tokens = np.arange(100, dtype=np.uint16)
    state = loader.TokenDataset(tokens, 16, seed=0).state_dict()
    loader.TokenDataset(tokens, 16, seed=0).load_state_dict(state)
    with pytest.raises(UserError, match="of seed 0, this is seed 1"):
        loader.TokenDataset(tokens, 16, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="of tokens 100, this is tokens 90"):
        loader.TokenDataset(tokens[:90], 16, seed=0).load_state_dict(state)


def test_padding_does_not_count():
    assert (loader.TokenDataset(np.arange(100), 16, seed=0).padding()["targets"] == loader.IGNORE_INDEX).all()


@pytest.mark.parametrize("length", [17, 100, 1000])
@pytest.mark.parametrize("count", [1, 160, 10_000])
def test_eval_dataset(length, count):
    tokens = np.arange(length)
    dataset = loader.EvalDataset(tokens, 16, count)
    starts = loader.eval_starts(tokens, 16, count)
    assert len(dataset) == len(starts) == max(1, min((length - 1) // 16, count // 16))
    assert starts[-1] + 17 <= length
    assert np.all(np.diff(starts) >= 16)
    windows = dataset.batch(0, len(dataset))
    assert windows["tokens"][:, 0].tolist() == starts.tolist()
    assert torch.equal(windows["targets"], windows["tokens"] + 1)


def test_unigram_loss():
    train = np.array([0, 0, 0, 1], np.uint16)
    targets = np.array([[0, 2]])
    assert loader.unigram_loss(train, targets, 3) == pytest.approx(-(np.log(4 / 7) + np.log(1 / 7)) / 2)
