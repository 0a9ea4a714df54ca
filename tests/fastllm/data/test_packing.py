"""Plans of sequences: every token once, best fit as the definition has it, in little time and memory."""

from __future__ import annotations

import numpy as np
import pytest

from fastllm.data.packing import BestFit, Concatenated, best_fit
from fastllm.data.permutation import key_of, mixed, permuted

RNG = np.random.default_rng()


def plain_best_fit(items: list[int], capacity: int) -> list[int]:
    """The room that is left in each bin, item by item."""
    rooms: list[int] = []
    for item in sorted(items, reverse=True):
        fitting = [room for room in rooms if room >= item]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - item)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [1, 2, 7, 30, 64])
def test_bins_are_those_of_best_fit_item_by_item(capacity):
    for _ in range(30):
        items = RNG.integers(1, RNG.integers(1, capacity + 1) + 1, RNG.integers(0, 200))
        counts = np.bincount(items, minlength=capacity + 1)
        bins = best_fit(counts, capacity)
        row, length, slot = bins.contents(np.arange(bins.count))
        rooms = capacity - np.bincount(row, length, minlength=bins.count).astype(int)
        assert sorted(rooms.tolist()) == plain_best_fit(items.tolist(), capacity)
        expected = [(n, k) for n in range(1, capacity + 1) for k in range(counts[n])]
        assert sorted(zip(length.tolist(), slot.tolist(), strict=True)) == expected


@pytest.mark.parametrize("method", [BestFit, Concatenated])
@pytest.mark.parametrize("seq_len", [1, 2, 5, 16])
def test_every_token_is_in_one_sequence_of_an_epoch(method, seq_len):
    for documents in (1, 2, 30):
        lengths = RNG.integers(1, 4 * seq_len + 1, documents).astype(np.uint32)
        packing = method(lengths, seq_len, seed=3)
        for epoch in range(3):
            row, document, start, length = packing.pieces(RNG.permutation(packing.sequences), epoch)
            assert (np.diff(row) >= 0).all()
            assert (np.bincount(row, length, minlength=packing.sequences) <= seq_len).all()
            pieces = zip(document.tolist(), start.tolist(), length.tolist(), strict=True)
            tokens = sorted((d, s + i) for d, s, n in pieces for i in range(n))
            assert tokens == [(d, i) for d in range(documents) for i in range(lengths[d])]


def test_best_fit_cuts_only_what_is_too_long():
    lengths = RNG.integers(1, 100, 500).astype(np.uint32)
    packing = BestFit(lengths, 32, 0)
    pieces = packing.pieces(np.arange(packing.sequences), 0)
    parts = np.bincount(pieces.document)
    assert (parts == -(-lengths.astype(int) // 32)).all()
    assert 1 - lengths.sum() / (32 * packing.sequences) < 0.05  # padding


def test_concatenation_cuts_at_every_sequence_end_and_pads_once():
    lengths = np.array([10, 3, 20], np.uint32)
    packing = Concatenated(lengths, 8, 0)
    assert packing.sequences == 5
    pieces = packing.pieces(np.arange(5), 0)
    assert np.bincount(pieces.row, pieces.length).tolist() == [8, 8, 8, 8, 1]


@pytest.mark.parametrize("method", [BestFit, Concatenated])
def test_any_order_of_asking_gives_the_same_and_epochs_differ(method):
    lengths = RNG.integers(1, 60, 300).astype(np.uint32)
    packing = method(lengths, 32, 7)
    together = packing.pieces(np.arange(packing.sequences), 1)
    for number in RNG.integers(packing.sequences, size=20).tolist():
        alone = method(lengths, 32, 7).pieces(np.array([number]), 1)
        for one, all_of_them in zip(alone[1:], together[1:], strict=True):
            assert one.tolist() == all_of_them[together.row == number].tolist()
    other = packing.pieces(np.arange(packing.sequences), 2)
    seed = method(lengths, 32, 8).pieces(np.arange(packing.sequences), 1)
    for changed in (other, seed):
        assert not all(np.array_equal(a, b) for a, b in zip(changed, together, strict=True))


def test_a_million_documents():
    """In little memory: the plan of an epoch is not held."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.3, 10**6), 10**6).astype(np.uint32) + 1
    packing = BestFit(lengths, 2048, 0)
    held = sum(a.nbytes for a in vars(packing).values() if isinstance(a, np.ndarray)) - lengths.nbytes
    assert held <= 12 * len(lengths)
    assert len(packing._bins.length) < 20_000
    assert 1 - lengths.sum() / (2048 * packing.sequences) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 100, 257, 4096, 10_007])
def test_a_permutation_is_one(n):
    for key in range(3):
        assert sorted(permuted(np.arange(n), n, key_of(key, n)).tolist()) == list(range(n))
    mixed = permuted(np.arange(n).repeat(2), np.full(2 * n, n), np.tile(np.array([1, 2], np.uint64), n))
    assert sorted(mixed[::2].tolist()) == list(range(n))


def test_permutations_take_each_index_everywhere():
    """20,000 of them: each of 64 numbers of times lies within 6 standard deviations of their mean."""
    counts = np.zeros((8, 8))
    keys = mixed(np.arange(20_000, dtype=np.uint64) + np.uint64(RNG.integers(2**40)))
    for index in range(8):
        counts[index] = np.bincount(permuted(np.full(len(keys), index), 8, keys), minlength=8)
    assert abs(counts - 2500).max() < 6 * (2500 * 7 / 8) ** 0.5
