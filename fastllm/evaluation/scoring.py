"""Log-probabilities of continuations, with what their contexts share computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding

from ..errors import UserError
from ..inference.paged_gpt import PagedGPT, PromptRows, Rows
from ..kernels import cross_entropy
from ..model.gpt import GPT

ROWS = 2048  # tokens of a batch on a CPU
GPU_ROWS = 16384
HEAD_ROWS = 256  # rows whose logits exist at once

Ints = NDArray[np.int64]


class Scored(NamedTuple):
    """A continuation to score: the tokens from ``start`` on, given those before, of which there is at least one."""

    tokens: Sequence[int]
    start: int


class Score(NamedTuple):
    """The log-probability of a continuation in nats, and whether each of its tokens is the most likely one."""

    log_prob: float
    greedy: bool


class Scorer(Protocol):
    """Scores continuations with a model."""

    max_seq_len: int  # tokens that the model sees

    def plan(self, sequences: Sequence[Scored]) -> int:
        """Tokens that the model will compute."""
        ...

    def score(self, sequences: Sequence[Scored]) -> Iterator[tuple[int, list[tuple[int, Score]]]]:
        """Yields the tokens that a batch computed and the scores that are ready, by the places of the sequences."""
        ...


class GPTScorer:
    """Scores continuations with a GPT.

    The sequences are sorted, so that those with a common beginning follow each other, and each token of the tree of
    their beginnings is computed once: the shots of a task, the context of its choices. A batch has no padding, and the
    head is computed for the tokens before those that are scored. On a CPU a score depends on nothing but its sequence,
    bit by bit.

    Args:
        model: its weights are copied, packed, at the first use.
        rows: tokens of a batch; None: 2,048 on a CPU and 16,384 on a GPU. A longer sequence is a batch by itself.
    """

    def __init__(self, model: GPT, *, rows: int | None = None) -> None:
        self.max_seq_len = model.config.max_seq_len
        self.rows = rows or (GPU_ROWS if model.head_weight.is_cuda else ROWS)
        self.gpt = model
        self._paged: PagedGPT | None = None
        self._slots = self._positions = 0

    def plan(self, sequences: Sequence[Scored]) -> int:
        return _new_tokens(_sorted(sequences)[1])

    def score(self, sequences: Sequence[Scored]) -> Iterator[tuple[int, list[tuple[int, Score]]]]:
        """See :class:`Scorer`.

        Raises:
            UserError: the logits of a sequence are not finite.
        """
        if not sequences:
            return
        order, (inputs, shared) = _sorted(sequences)
        longest = max(map(len, inputs))
        paged = self._packed(max(self.rows, longest) + longest, longest)
        batch = _Batch(self._slots, np.arange(self._slots))
        for place, tokens, lcp in zip(order, inputs, shared, strict=True):
            sequence = sequences[place]
            common = batch.usable(lcp, sequence.start)
            if batch.size and len(tokens) > common and batch.size + len(tokens) - common > self.rows:
                yield batch.size, self._compute(paged, batch, sequences)
                batch = batch.following(min(lcp, sequence.start - 1))
                common = batch.usable(lcp, sequence.start)
            batch.add(place, tokens, common, sequence.start)
        yield batch.size, self._compute(paged, batch, sequences)

    def _packed(self, slots: int, positions: int) -> PagedGPT:
        """The model with a pool and tables of at least these sizes."""
        if self._paged is None:
            self._slots, self._positions = slots, positions
            self._paged = PagedGPT(self.gpt, 1, slots, positions)
        elif slots > self._slots or positions > self._positions:
            self._slots, self._positions = max(slots, self._slots), max(positions, self._positions)
            self._paged.allocate(1, self._slots, self._positions)
        return self._paged

    @torch.inference_mode()
    def _compute(self, paged: PagedGPT, batch: _Batch, sequences: Sequence[Scored]) -> list[tuple[int, Score]]:
        wanted = np.unique(np.concatenate(batch.wanted))
        rows = batch.rows(wanted, paged.device)
        hidden = paged.hidden(embedding(rows.tokens, paged.embedding), rows)
        places = np.searchsorted(wanted, np.concatenate(batch.wanted))
        targets = np.concatenate(
            [np.asarray(sequences[place].tokens[sequences[place].start :]) for place in batch.places]
        )
        log_probs, greedy = _of_targets(paged, hidden, torch.from_numpy(places), torch.from_numpy(targets))
        ends = [*accumulate(map(len, batch.wanted))]
        found = []
        for place, start, end in zip(batch.places, [0, *ends], ends, strict=False):
            total = float(log_probs[start:end].sum())
            if not np.isfinite(total):
                raise UserError("the model's logits are not finite: its weights or its dtype are at fault")
            found.append((place, Score(total, bool(greedy[start:end].all()))))
        return found


def _sorted(sequences: Sequence[Scored]) -> tuple[list[int], tuple[list[Ints], list[int]]]:
    """The order in which sequences with a common beginning stand together; their inputs in it, all tokens but the last;
    and how many tokens each has in common with the one before it."""
    arrays = [np.asarray(sequence.tokens, np.int64) for sequence in sequences]
    order = sorted(range(len(arrays)), key=lambda i: arrays[i].astype(">u4").tobytes())
    inputs = [arrays[i][:-1] for i in order]
    shared = [0]
    for before, tokens in pairwise(inputs):
        length = min(len(before), len(tokens))
        other = np.flatnonzero(before[:length] != tokens[:length])
        shared.append(int(other[0]) if len(other) else length)
    return order, (inputs, shared)


def _new_tokens(parts: tuple[list[Ints], list[int]]) -> int:
    return sum(map(len, parts[0])) - sum(parts[1])


@dataclass
class _Batch:
    """Sequences that are computed together. The keys of a token that several begin with lie in the pool once."""

    slots: int  # of the pool
    free: Ints  # slots that nothing is in
    path: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # the slots of the latest sequence
    row_of: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # and its rows; -1: of an earlier batch
    size: int = 0  # rows
    places: list[int] = field(default_factory=list)
    wanted: list[Ints] = field(default_factory=list)  # by sequence, the rows before its continuation's tokens
    parts: list[tuple[Ints, int, Ints]] = field(default_factory=list)  # new tokens, how many precede them, all slots

    def usable(self, shared: int, start: int) -> int:
        """How many of the ``shared`` first tokens need not be computed: the head's rows must be of this batch."""
        shared = min(shared, len(self.path))
        known = int((self.row_of[:shared] < 0).sum())
        return min(shared, start - 1) if start - 1 < known else shared

    def add(self, place: int, tokens: Ints, shared: int, start: int) -> None:
        new = len(tokens) - shared
        slots, self.free = self.free[:new], self.free[new:]
        self.path = np.concatenate([self.path[:shared], slots])
        self.row_of = np.concatenate([self.row_of[:shared], np.arange(self.size, self.size + new)])
        self.size += new
        if new:
            self.parts.append((tokens[shared:], shared, self.path))
        self.places.append(place)
        self.wanted.append(self.row_of[start - 1 :])

    def following(self, shared: int) -> _Batch:
        """An empty batch, whose first sequence begins with ``shared`` tokens of the latest one."""
        path = self.path[:shared]
        return _Batch(self.slots, np.setdiff1d(np.arange(self.slots), path), path, np.full(len(path), -1))

    def rows(self, wanted: Ints, device: torch.device) -> Rows:
        def on(parts: list[Ints], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(dtype).to(device)

        queries, keys = [len(tokens) for tokens, _, _ in self.parts], [len(slots) for _, _, slots in self.parts]
        cu_queries, cu_keys = (on([np.array([0, *accumulate(n)])], torch.int32) for n in (queries, keys))
        slots = on([slots for _, _, slots in self.parts])
        prompts = PromptRows(0, cu_queries, cu_keys, slots, max(queries), max(keys))
        return Rows(
            on([tokens for tokens, _, _ in self.parts]),
            on([np.arange(before, len(slots)) for _, before, slots in self.parts]),
            on([slots[before:] for _, before, slots in self.parts]),
            on([wanted]),
            prompts=prompts,
        )


def _of_targets(
    paged: PagedGPT, hidden: Tensor, rows: Tensor, targets: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The log-probability of each target after its row of ``hidden``, float64, and whether it is the likeliest."""
    log_probs, greedy = np.empty(len(rows)), np.empty(len(rows), bool)
    which = rows.numpy()
    for first in range(0, len(hidden), HEAD_ROWS):
        logits = paged.logits(hidden[first : first + HEAD_ROWS])
        here = np.flatnonzero((which >= first) & (which < first + HEAD_ROWS))
        row, target = (rows[here] - first).to(logits.device), targets[here].to(logits.device)
        _, lse = cross_entropy(
            logits, logits.new_zeros(len(logits), dtype=torch.int64), reduction="none", return_lse=True
        )
        chosen = logits[row, target]
        log_probs[here] = (chosen - lse[row]).cpu().numpy()
        greedy[here] = (chosen >= logits.amax(1)[row]).cpu().numpy()
    return log_probs, greedy
