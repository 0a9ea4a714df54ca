"""MinHash signatures, and what a choice of bands and rows finds.

The similarity of two documents is the Jaccard similarity of their sets of word n-grams: common n-grams over all
n-grams. A signature of ``bands * rows`` values estimates it by the share of values that agree (Broder 1997). `rensa`
computes the values by Fast Similarity Sketching (Dahlgaard, Knudsen and Thorup 2017, arXiv:1704.04370), whose estimate
is as good and which takes one or a few hashes for each n-gram instead of one for each n-gram and value.

Two documents are candidates where all ``rows`` values of a band agree, which at similarity ``s`` has the probability
``1 - (1 - s ** rows) ** bands``; it is steepest near ``(1 / bands) ** (1 / rows)``. A candidate counts as a duplicate
where the share of equal values in the whole signatures reaches ``threshold``. Probability of both, by `detection`:

    bands × rows  steepest  threshold  bytes   s = 0.4    0.5      0.6     0.7     0.75    0.8     0.85    0.9   cost
    14 × 8 = 112    0.719      0.70      448   0.00000  0.00001  0.0086  0.3575  0.7173  0.9206  0.9884  0.9996  0.05
    16 × 8 = 128    0.707      0.70      512   0.00000  0.00000  0.0068  0.3872  0.7660  0.9453  0.9938  0.9999  0.06
    18 × 7 = 126    0.662      0.70      504   0.00000  0.00000  0.0074  0.4365  0.8431  0.9822  0.9990  1.0000  0.13
    20 × 6 = 120    0.607      0.70      480   0.00000  0.00001  0.0143  0.5317  0.9024  0.9948  0.9999  1.0000  0.27
    25 × 5 = 125    0.525      0.70      500   0.00000  0.00000  0.0103  0.5049  0.8997  0.9962  1.0000  1.0000  0.55
    32 × 8 = 256    0.648      0.70     1024   0.00000  0.00000  0.0003  0.4528  0.9347  0.9971  1.0000  1.0000  0.12

Cost: the share of pairs at similarity 0.5 that are compared in vain. FineWeb's 14 × 8 misses 8 % at 0.8, because the
bands alone decide there. 20 × 6 is the smallest signature that finds 95 % at 0.8 with room to spare, and is the
default: it merges one in 100,000 at 0.5, and each document costs 480 bytes on disk.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError, pip_install
from .settings import check_flag, check_integer, check_share
from .words import shingles

Signature = NDArray[np.uint32]

EMPTY = 0xFFFFFFFF  # each value of the signature of a text without words, which is like no other
_PROBE = np.array([1, 2, 3, 10, 20, 30, 999, 1 << 40, (1 << 64) - 1], np.uint64)
_PROBED = (453277955, 1078862204, 3280318398, 1427014036, 279942436, 53439365, 650986866, 543482926)


@dataclass(frozen=True)
class MinHashSettings:
    """Near duplicates by MinHash-LSH.

    Attributes:
        enabled: whether near duplicates are looked for.
        ngram: words in an n-gram. 5 is FineWeb's.
        bands: groups of values of the signature. Documents that agree in one are compared.
        rows: values in a band.
        threshold: the share of equal values from which two documents are duplicates.
        seed: of the signatures. Only signatures of one seed can be compared.
    """

    enabled: bool = True
    ngram: int = 5
    bands: int = 20
    rows: int = 6
    threshold: float = 0.7
    seed: int = 1

    def __post_init__(self) -> None:
        check_flag("minhash: enabled", self.enabled)
        for name, most in (("ngram", 100), ("bands", 1000), ("rows", 100)):
            check_integer(f"minhash: {name}", getattr(self, name), 1, most)
        check_integer("minhash: seed", self.seed, 0, 2**63 - 1)
        check_share("minhash: threshold", self.threshold)

    @property
    def permutations(self) -> int:
        """Values in a signature."""
        return self.bands * self.rows

    @property
    def least_equal(self) -> int:
        """How many values of two signatures agree, at least, where the documents are duplicates."""
        return math.ceil(self.threshold * self.permutations - 1e-9)

    def about(self) -> dict[str, Any]:
        """For the header of a file of signatures: what decides their values, and the bands."""
        return {"algorithm": "rensa R-MinHash 2", **{k: v for k, v in asdict(self).items() if k != "enabled"}}


class MinHash:
    """Computes signatures. They depend on the settings and the text alone."""

    def __init__(self, settings: MinHashSettings | None = None) -> None:
        self.settings = settings or MinHashSettings()
        try:
            import rensa
        except ImportError:
            raise UserError(f"MinHash needs rensa: {pip_install('data')}") from None
        self._digest = rensa.RMinHash.digest_matrix_from_flat_token_hashes
        if tuple(self._values(_PROBE, 8, 1).tolist()) != _PROBED:
            raise UserError('this version of rensa computes other signatures than 0.5: pip install "rensa==0.5.*"')

    def signature(self, text: str) -> Signature:
        """uint32 ``[bands * rows]``."""
        hashes = shingles(text, self.settings.ngram)
        if not len(hashes):
            return np.full(self.settings.permutations, EMPTY, np.uint32)
        return self._values(hashes, self.settings.permutations, self.settings.seed)

    def _values(self, hashes: NDArray[np.uint64], count: int, seed: int) -> Signature:
        offsets = np.array([0, len(hashes)], np.uint64)
        return np.array(self._digest(hashes, offsets, count, seed).to_rows()[0], np.uint32)


def detection(settings: MinHashSettings, similarity: float) -> float:
    """The probability that two documents of that Jaccard similarity are found to be duplicates."""
    total, bands, rows = settings.permutations, settings.bands, settings.rows
    found = 0.0
    for equal in range(settings.least_equal, total + 1):
        # The equal values are any of the signature's: by inclusion and exclusion over the bands that they fill.
        unfilled = sum(
            (-1) ** full * math.comb(bands, full) * math.comb(total - full * rows, equal - full * rows)
            for full in range(min(bands, equal // rows) + 1)
        )
        share = 1 - unfilled / math.comb(total, equal)
        found += math.comb(total, equal) * similarity**equal * (1 - similarity) ** (total - equal) * share
    return found
