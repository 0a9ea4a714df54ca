"""Batches of packed documents, and what they are for any order of asking."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fastllm.data.loader import (
    IGNORE_INDEX,
    EvaluationData,
    Sequences,
    TrainingData,
    cu_seqlens_of,
    unigram_loss,
)
from fastllm.data.mixture import Mixture
from fastllm.data.packing import BestFit, Concatenated
from fastllm.data.token_data import Documents
from fastllm.errors import UserError

EOS = 0
RNG = np.random.default_rng()


class Row:
    """Documents of tokens that tell themselves: 1000 · document + place, and the end-of-text token last."""

    eos_id = EOS

    def __init__(self, lengths: np.ndarray) -> None:
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        self.documents = Documents(starts, lengths)
        self.texts = [[*(1000 * (1 + d) + np.arange(n - 1)).tolist(), EOS] for d, n in enumerate(lengths.tolist())]
        self.tokens = np.array([token for text in self.texts for token in text], np.uint32)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop
        return self.tokens[start:stop]

    def sequences(self, seq_len: int, method: type = BestFit, chosen: slice = slice(None)) -> Sequences:
        documents = Documents(*(column[chosen] for column in self.documents))
        return Sequences(self, documents, method(documents.lengths, seq_len, 0), seq_len)


def some_lengths(n: int = 60, longest: int = 50) -> np.ndarray:
    return RNG.integers(1, longest, n).astype(np.uint32)


def test_inputs_and_targets_of_documents():
    """Each document, or each part of one, with its end; the end-of-text token or the token before it begins it."""
    row = Row(some_lengths())
    before = {token: text[i - 1] if i else EOS for text in row.texts for i, token in enumerate(text[:-1])}
    sequences = row.sequences(16)
    batch = sequences.build(sequences.rows(np.arange(sequences.packing.sequences), 0))
    cu_seqlens = cu_seqlens_of(batch["positions"]).tolist()
    tokens, targets, positions = (batch[name].flatten().tolist() for name in ("tokens", "targets", "positions"))
    for start, stop in pairwise(cu_seqlens):
        inputs, part = tokens[start:stop], targets[start:stop]
        assert positions[start:stop] == list(range(stop - start))
        if IGNORE_INDEX in part:
            assert set(part) == {IGNORE_INDEX}
            assert stop % 16 == 0  # padding ends a sequence
            continue
        assert inputs[1:] == part[:-1]
        assert EOS not in part[:-1]
        assert all(inputs[i] == before[token] for i, token in enumerate(part) if token != EOS)
    assert sorted(token for token in targets if token != IGNORE_INDEX) == sorted(row.tokens.tolist())
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_concatenated_targets_follow_their_inputs():
    row = Row(some_lengths())
    sequences = row.sequences(16, Concatenated)
    batch = sequences.build(sequences.rows(np.arange(sequences.packing.sequences), 0))
    assert batch.keys() == {"tokens", "targets"}
    real = batch["targets"] != IGNORE_INDEX
    assert sorted(batch["targets"][real].tolist()) == sorted(row.tokens.tolist())
    assert torch.equal(batch["tokens"][:, 1:][real[:, 1:]], batch["targets"][:, :-1][real[:, 1:]])


@pytest.mark.parametrize("method", [BestFit, Concatenated])
def test_each_token_once_an_epoch_in_another_order(method):
    row = Row(some_lengths())
    data = TrainingData([row.sequences(16, method)], seed=3)
    n = data.sources[0].packing.sequences
    epochs = [data.batch(first, n)["targets"] for first in (0, n)]
    for targets in epochs:
        assert sorted(targets[targets != IGNORE_INDEX].tolist()) == sorted(row.tokens.tolist())
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0], TrainingData([row.sequences(16, method)], seed=4).batch(0, n)["targets"])


@pytest.mark.parametrize("mixed", [False, True])
def test_any_order_of_asking_gives_the_same(mixed):
    """Across epochs and sources, whatever the number of items: so for any number of ranks."""

    lengths = some_lengths(80)

    def make() -> TrainingData:
        row = Row(lengths)
        sources = [row.sequences(16, chosen=slice(60)), row.sequences(16, chosen=slice(60, 80))]
        return TrainingData(sources, 5, Mixture([1, 2], 5)) if mixed else TrainingData(sources[:1], 5)

    whole = make().batch(0, 600)
    data = make()
    for first in RNG.permutation(600 - 7).tolist()[:60]:
        n = int(RNG.integers(1, 8))
        for name, tensor in data.batch(first, n).items():
            assert torch.equal(tensor, whole[name][first : first + n])
    for name, tensor in make().batch(150, 450).items():
        assert torch.equal(tensor, whole[name][150:])


def test_a_source_is_read_as_often_as_its_weight_says():
    row = Row(some_lengths(80))
    sources = [row.sequences(16, chosen=slice(50)), row.sequences(16, chosen=slice(50, 80))]
    targets = TrainingData(sources, 0, Mixture([1, 3], 0)).batch(0, 4096)["targets"]
    first = ((targets > 0) & (targets < 51_000)).any(1)
    second = (targets >= 51_000).any(1)
    assert not (first & second).any()
    ends_only = ~(first | second)  # of documents without text
    assert first.sum() <= 1024 <= (first | ends_only).sum()


def test_a_dataset_recognises_its_state():
    sequences = [Row(some_lengths()).sequences(16)]
    identity = {"tokens": "abc", "weights": [0.5, 2.0], "schedule": 100}
    state = TrainingData(sequences, 0, None, identity).state_dict()
    TrainingData(sequences, 0, None, identity).load_state_dict(state)
    for changed, words in (
        ({"tokens": "abd"}, "of tokens abc, this is tokens abd"),
        ({"weights": [0.5, 1.0]}, r"of weights \[0.5, 2.0\], this is weights \[0.5, 1.0\]"),
        (
            {"schedule": 200},
            "weights move over 100 sequences in the checkpoint and over 200 in this run: .*train.steps",
        ),
    ):
        with pytest.raises(UserError, match=words):
            TrainingData(sequences, 0, None, identity | changed).load_state_dict(state)
    with pytest.raises(UserError, match="of seed 0, this is seed 1"):
        TrainingData(sequences, 1, None, identity).load_state_dict(state)
    with pytest.raises(UserError, match="of weights"):  # without weights now
        TrainingData(sequences, 0, None, {"tokens": "abc"}).load_state_dict(state)


@pytest.mark.parametrize("method", [BestFit, Concatenated])
def test_padding_does_not_count(method):
    sequences = Row(some_lengths()).sequences(16, method)
    padding, batch = sequences.padding(), sequences.build(sequences.rows(np.arange(1), 0))
    assert (padding["targets"] == IGNORE_INDEX).all()
    assert {n: (t.shape, t.dtype) for n, t in padding.items()} == {n: (t.shape, t.dtype) for n, t in batch.items()}


@pytest.mark.parametrize("count", [1, 160, 10_000])
def test_evaluation_data(count):
    sequences = Row(some_lengths()).sequences(16)
    data = EvaluationData(sequences, count)
    assert len(data) == max(1, min(sequences.packing.sequences, count // 16))
    batch = data.batch(0, len(data))
    assert len(batch["tokens"]) == len(data)
    rows = {
        tuple(row)
        for row in sequences.build(sequences.rows(np.arange(sequences.packing.sequences), 0))["targets"].tolist()
    }
    assert {tuple(row) for row in batch["targets"].tolist()} <= rows


def test_cu_seqlens_have_few_lengths():
    lengths = set()
    for documents in range(1, 70):
        counts = np.bincount(RNG.integers(0, documents, 200), minlength=documents)
        counts = counts[counts > 0]
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in counts])).reshape(4, -1)
        cu_seqlens = cu_seqlens_of(positions)
        assert cu_seqlens.dtype == torch.int32
        sizes = cu_seqlens.diff().tolist()
        assert sizes[: len(counts)] == counts.tolist()
        assert not any(sizes[len(counts) :])
        lengths.add(len(cu_seqlens))
    assert lengths <= {9, 17, 33, 65, 129}


def test_unigram_loss():
    counts, targets = np.array([3, 1, 0]), np.array([0, 2])
    assert unigram_loss(counts, targets) == pytest.approx(-(np.log(4 / 7) + np.log(1 / 7)) / 2)
