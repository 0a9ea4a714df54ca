"""Log-probabilities: against the plain forward pass, whatever is shared and however it is batched."""

from __future__ import annotations

import random

import pytest
import torch

from fastllm.errors import UserError
from fastllm.evaluation import GPTScorer, Scored

from . import small


def tree(seed: int, n: int = 12) -> list[Scored]:
    """Sequences that share beginnings of all lengths, some equal, some the beginning of another."""
    numbers = random.Random(seed)
    found = [Scored([1, 2], 1), Scored([1, 2], 1), Scored([1, 2, 3, 1, 2, 3], 3), Scored([1, 2, 3], 2)]
    for _ in range(n):
        context = [1, 2, 3][: numbers.randrange(1, 4)] + [numbers.randrange(6) for _ in range(numbers.randrange(20))]
        for _ in range(3):
            continuation = [numbers.randrange(3) for _ in range(numbers.randrange(1, 9))]
            found.append(Scored(context + continuation, len(context)))
        found.append(Scored(found[-1].tokens, max(1, len(context) - 2)))
    numbers.shuffle(found)
    return found


def scores(scorer: GPTScorer, sequences: list[Scored]) -> list[tuple[float, bool]]:
    got = [(place, (*score,)) for _, found in scorer.score(sequences) for place, score in found]
    assert sorted(place for place, _ in got) == [*range(len(sequences))]
    return [score for _, score in sorted(got)]


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_forward_pass(seed):
    gpt = small.model().gpt.double().float()
    sequences = tree(seed)
    found = scores(GPTScorer(gpt), sequences)
    reference = gpt.double()
    for (tokens, start), (log_prob, greedy) in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = torch.nn.functional.linear(reference.model(torch.tensor([tokens])), reference.head_weight)[0]
        targets = torch.tensor(tokens[start:])
        wanted = logits.log_softmax(-1)[start - 1 : -1].gather(1, targets[:, None]).sum()
        assert log_prob == pytest.approx(float(wanted), rel=1e-5)
        assert greedy == bool((logits[start - 1 : -1].argmax(1) == targets).all())


@pytest.mark.parametrize("seed", range(4))
def test_batches_change_no_bit(seed):
    """A score depends on its sequence alone, also where the beginnings that it shares are of an earlier batch."""
    gpt, sequences = small.model().gpt, tree(seed, 20)
    whole = scores(GPTScorer(gpt, rows=10_000), sequences)
    for rows in (1, 7, 30, 100):
        assert scores(GPTScorer(gpt, rows=rows), sequences) == whole
    scorer = GPTScorer(gpt)
    assert [scores(scorer, [sequence])[0] for sequence in sequences] == whole  # the pool is used again


def test_computes_each_shared_token_once():
    gpt, context = small.model().gpt, [*range(100)]
    sequences = [Scored([*context, i, 5], 100) for i in range(4)]
    scorer = GPTScorer(gpt)
    assert scorer.plan(sequences) == 104
    assert sum(tokens for tokens, _ in scorer.score(sequences)) == 104
    letters = [Scored([*context, i], 100) for i in range(4)]
    assert scorer.plan(letters) == 100
    assert sum(tokens for tokens, _ in GPTScorer(gpt, rows=16).score(letters)) == 100


def test_nothing_to_score():
    assert list(GPTScorer(small.model().gpt).score([])) == []


def test_logits_that_are_not_finite():
    gpt = small.model().gpt
    gpt.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        list(GPTScorer(gpt).score([Scored([1, 2, 3], 1)]))


@pytest.mark.gpu
def test_on_a_gpu():
    gpt, sequences = small.model().gpt, tree(0)
    wanted = scores(GPTScorer(gpt), sequences)
    for rows in (16, None):
        found = scores(GPTScorer(gpt.cuda(), rows=rows), sequences)
        for (log_prob, _), (other, _) in zip(found, wanted, strict=True):
            assert log_prob == pytest.approx(other, rel=1e-3)
