"""Recall and false merges, measured against the true Jaccard similarity of real texts and edited copies of them."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from fastllm.data.deduplication import MinHash, MinHashSettings, detection, near_duplicates, write_signatures
from tests.fastllm.data.deduplication.texts import edited, jaccard, ngrams_of, overlap, pieces

CERTAINTY = 0.01  # of a wrong claim: how likely chance alone makes a worse method look as good as is asserted
RATES = (0.004, 0.01, 0.02, 0.04, 0.1, 0.11, 0.12, 0.14, 0.16, 0.2)


def at_most(events: int, trials: int, rate: float) -> float:
    """The probability that at most so many events happen in so many trials at that rate."""
    term = total = trials * math.log1p(-rate)
    for k in range(1, events + 1):
        term += math.log((trials - k + 1) * rate / (k * (1 - rate)))
        total = np.logaddexp(total, term)
    return math.exp(total)


def shows_rate_below(events: int, trials: int, rate: float) -> bool:
    """Whether a rate of events of ``rate`` or more can be ruled out."""
    return trials > 0 and at_most(events, trials, rate) < CERTAINTY


@pytest.fixture(scope="module")
def corpus():
    """Originals, then edited copies: all texts; the original and the true similarity of each copy; all signatures."""
    draw = random.Random(1)
    originals = pieces(1250, words=100)
    copies = [(i, edited(text, rate, draw)) for rate in RATES for i, text in enumerate(originals)]
    texts = originals + [text for _, text in copies]
    sources = [i for i, _ in copies]
    ngrams = [ngrams_of(text) for text in originals]
    similarities = [overlap(ngrams[i], ngrams_of(text)) for i, text in copies]
    minhash = MinHash()
    return texts, sources, similarities, [minhash.signature(text) for text in texts]


def measure(corpus, settings, folder):
    """Of the copies at a true similarity of 0.8 and more: how many are kept, and how many there are. Of those below
    0.5: how many are dropped for a document that they resemble by less than 0.5, and how many there are."""
    texts, sources, similarities, values = corpus
    assert settings.permutations == len(values[0])
    write_signatures(folder / "signatures", settings, values)
    repeated, signatures = near_duplicates([folder / "signatures"], folder)
    counts = Counter()
    first = len(texts) - len(sources)
    for i, similarity in enumerate(similarities, first):
        if similarity >= 0.8:
            counts["near"] += 1
            counts["missed"] += repeated[i] < 0
        elif similarity < 0.5:
            counts["far"] += 1
            counts["merged"] += repeated[i] >= 0 and jaccard(texts[i], texts[repeated[i]]) < 0.5
    for i in np.flatnonzero(repeated >= 0)[:2000].tolist():
        assert repeated[i] < i and repeated[repeated[i]] == -1
        assert signatures.similarity(i, int(repeated[i])) >= settings.threshold
    return counts


def test_recall_and_false_merges(corpus, tmp_path):
    counts = measure(corpus, MinHashSettings(), tmp_path)
    assert shows_rate_below(counts["missed"], counts["near"], 0.05), counts
    assert shows_rate_below(counts["merged"], counts["far"], 0.001), counts


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (MinHashSettings(bands=5, rows=24), "missed"),
        (MinHashSettings(threshold=0.9), "missed"),
        (MinHashSettings(bands=40, rows=3, threshold=0.4), "merged"),
    ],
)
def test_bad_settings_are_told(corpus, tmp_path, bad, found):
    """The test above would fail with them."""
    counts = measure(corpus, bad, tmp_path)
    total, rate = ("near", 0.05) if found == "missed" else ("far", 0.001)
    assert not shows_rate_below(counts[found], counts[total], rate), counts


def test_detection_is_what_happens():
    """The computed probability, against signatures drawn with that similarity."""
    settings = MinHashSettings(bands=8, rows=4, threshold=0.6)
    draw = np.random.default_rng(0)
    for similarity in (0.5, 0.65, 0.8):
        equal = draw.random((20_000, settings.bands, settings.rows)) < similarity
        both = equal.all(2).any(1) & (equal.sum((1, 2)) >= settings.least_equal)
        expected = detection(settings, similarity)
        assert abs(both.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000)


def test_signatures_estimate_without_bias(corpus):
    """The mean error is within 5 of its standard errors, and values scattered no more than MinHash's."""
    texts, sources, similarities, values = corpus
    first = len(texts) - len(sources)
    chosen = [i for i in range(len(sources)) if 0.3 < similarities[i] < 0.95][::5]
    errors, variances = [], []
    for i in chosen:
        equal = values[first + i] == values[sources[i]]
        errors.append(equal.mean() - similarities[i])
        variances.append(similarities[i] * (1 - similarities[i]) / 120)
    assert abs(np.mean(errors)) < 5 * math.sqrt(np.mean(variances) / len(errors))
    assert np.mean(np.square(errors)) < 1.3 * np.mean(variances)
