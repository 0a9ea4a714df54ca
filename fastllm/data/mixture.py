"""Which source each item of a run comes from: weights, which may move to others towards the end of the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UserError, did_you_mean
from ..input_files import shown
from .permutation import key_of, mixed, permuted

BLOCK = 4096  # items, at most, whose sources are decided together; of a schedule the run has at least BLOCKS
BLOCKS = 64


class Mixture:
    """Sources in proportion to weights: every block of items has its quota of each, and the error is carried on.

    So the sources of any first n blocks are within an item of what the weights ask for. In a block the sources are in
    an order that the seed decides. An item's source, and which item of that source it is, depend on the seed and the
    item's index alone.

    Args:
        weights: of each source; only their proportions count.
        seed: of the order inside the blocks.
        anneal_weights: the weights at the end of the run; None: they don't change.
        anneal_from: the share of the run from which they move there, linearly.
        items: of the whole run. Only a schedule depends on it.
    """

    def __init__(
        self,
        weights: Sequence[float],
        seed: int,
        anneal_weights: Sequence[float] | None = None,
        anneal_from: float = 0.0,
        items: int = 0,
    ) -> None:
        self._seed = seed
        self._begin = np.array(weights) / np.sum(weights)
        self._end = self._begin
        self._from, self._to = float(items), float(items)
        self.block = BLOCK
        if anneal_weights is not None:
            self._end = np.array(anneal_weights) / np.sum(anneal_weights)
            self._from = anneal_from * items
            self.block = min(BLOCK, max(1, items // BLOCKS))
        self._before = np.zeros((1, len(weights)), np.int64)  # of each block: items of each source in those before it

    def expected(self, items: float) -> np.ndarray:
        """How many of the first ``items`` the weights ask for of each source: their integral."""
        annealed = min(max(items - self._from, 0.0), self._to - self._from)
        moved = annealed**2 / (2 * (self._to - self._from)) if annealed else 0.0
        moved += max(items - self._to, 0.0)  # a run that is longer than planned stays at its last weights
        return self._begin * (items - moved) + self._end * moved

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each item, and which of that source's items it is."""
        block, place = np.divmod(index, self.block)
        self._extend(int(block.max(initial=0)) + 2)
        before, after = self._before[block], self._before[block + 1]
        place = permuted(place, self.block, mixed(block.astype(np.uint64) ^ np.uint64(key_of(self._seed))))
        ends = np.cumsum(after - before, axis=1)
        source = (place[:, None] >= ends).sum(1)
        rows = np.arange(len(index))
        first = ends[rows, source] - (after - before)[rows, source]
        return source, before[rows, source] + place - first

    def _extend(self, blocks: int) -> None:
        """Compute the quotas up to that of block ``blocks - 1``."""
        known = len(self._before)
        if known >= blocks:
            return
        table = np.empty((max(blocks, 2 * known), self._before.shape[1]), np.int64)
        table[:known] = self._before
        for number in range(known, len(table)):
            wanted = np.maximum(self.expected(number * self.block) - table[number - 1], 0.0)
            quota = np.floor(wanted * (self.block / wanted.sum())).astype(np.int64)
            short = self.block - int(quota.sum())
            quota[np.argsort(quota - wanted, kind="stable")[:short]] += 1
            table[number] = table[number - 1] + quota
        self._before = table


def parse_weights(option: str, entries: Sequence[str], sources: Sequence[str]) -> list[float]:
    """The weight of each of ``sources``, from entries ``NAME=WEIGHT``. ``option``: their name in errors."""
    found: dict[str, float] = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        if name not in sources:
            what = f"{shown(name)}, which is no source of the tokens" if name else f"{shown(entry)}, not NAME=WEIGHT"
            raise UserError(f"{option} has {what}{did_you_mean(name, sources)}")
        if name in found:
            raise UserError(f"{option} has {shown(name)} twice")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = -1.0
        if not 0 <= found[name] < 1e9:
            raise UserError(
                f"{option}: the weight of {shown(name)} must be a number of at least 0, not {shown(number)}"
            )
    missing = [name for name in sources if name not in found]
    if missing:
        raise UserError(f"{option} has no weight of {', '.join(map(shown, missing))}: 0 leaves a source out")
    if not any(found.values()):
        raise UserError(f"{option} must have a weight above 0")
    return [found[name] for name in sources]
