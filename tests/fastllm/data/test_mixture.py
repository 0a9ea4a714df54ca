"""Sources of a run's items: in proportion, by a schedule, and a function of the index alone."""

from __future__ import annotations

import numpy as np
import pytest

from fastllm.data.mixture import BLOCK, Mixture, parse_weights
from fastllm.errors import UserError


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 0, 1], [1e-4, 5, 3, 0.01], [1]])
def test_every_prefix_of_blocks_has_its_share(weights):
    mixture = Mixture(weights, seed=1)
    source, item = mixture.locate(np.arange(9 * BLOCK))
    for blocks in range(1, 10):
        counts = np.bincount(source[: blocks * BLOCK], minlength=len(weights))
        assert abs(counts - mixture.expected(blocks * BLOCK)).max() < 1 + 1e-6
    for number in range(len(weights)):  # each item of a source once, from 0 on
        assert sorted(item[source == number].tolist()) == list(range((source == number).sum()))


def test_a_schedule_moves_linearly_to_the_last_weights():
    items = 64_000  # 64 blocks of a thousand
    mixture = Mixture([3, 1], 0, [1, 4], 0.5, items)
    source, _ = mixture.locate(np.arange(2 * items))
    share = [source[i : i + 8000].mean() for i in range(0, 2 * items, 8000)]
    expected = [0.25] * 4 + [0.25 + 0.55 * (i + 0.5) / 4 for i in range(4)]
    expected += [0.8] * 8  # of a run that takes longer
    assert share == pytest.approx(expected, abs=2.1 / 8000)  # an item at each end


def test_an_item_does_not_depend_on_what_was_asked_before():
    index = np.random.default_rng().integers(0, 50_000, 100)
    arguments = ([1, 2, 3], 5, [3, 2, 1], 0.5, 20_000)
    together = Mixture(*arguments).locate(index)
    for place, i in enumerate(index.tolist()):
        source, item = Mixture(*arguments).locate(np.array([i]))
        assert (source[0], item[0]) == (together[0][place], together[1][place])
    order = Mixture([1, 1], 0).locate(np.arange(100))[0]
    assert not np.array_equal(order, Mixture([1, 1], 1).locate(np.arange(100))[0])


def test_weights_by_name():
    assert parse_weights("data.weights", ["a=b=2", "web=.5"], ["web", "a=b"]) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["web=1", "wkii=2"], "data.weights has 'wkii', which is no source of the tokens; did you mean 'wiki'?"),
        (["web=1"], "data.weights has no weight of 'wiki': 0 leaves a source out"),
        (["web=1", "web=2", "wiki=1"], "data.weights has 'web' twice"),
        (["web=-1", "wiki=1"], "data.weights: the weight of 'web' must be a number of at least 0, not '-1'"),
        (["web=nan", "wiki=1"], "must be a number of at least 0, not 'nan'"),
        (["web", "wiki=1"], "data.weights has 'web', not NAME=WEIGHT"),
        (["web=0", "wiki=0"], "data.weights must have a weight above 0"),
    ],
)
def test_weights_that_are_wrong(entries, words):
    with pytest.raises(UserError) as error:
        parse_weights("data.weights", entries, ["web", "wiki"])
    assert words in str(error.value)
