from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm.errors import ParameterError
from fastllm.inference.sampling import FEW, NUCLEUS, SamplingParams, gumbel, sample


@dataclass
class Row:
    params: SamplingParams
    key: int = 0
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    mask: Tensor | None = None

    def allowed(self, vocab_size: int) -> Tensor | None:
        return self.mask


def drawn(logits: Tensor, count: int = 4000, **params: Any) -> Tensor:
    """How often each token comes, over as many keys."""
    rows = [Row(SamplingParams(**params), key) for key in range(count)]
    found = sample(logits.expand(count, -1), rows)
    return torch.bincount(torch.tensor([s.token for s in found]), minlength=len(logits)) / count


def is_drawn_from(shares: Tensor, probs: Tensor, count: int = 4000) -> bool:
    """Chi-square: with 4 standard deviations of room, which a right sampler leaves once in 30,000 seeds."""
    seen = probs > 0
    degrees = int(seen.sum()) - 1
    statistic = count * ((shares - probs)[seen].square() / probs[seen]).sum()
    return bool((shares[~seen] == 0).all() and statistic <= degrees + 4 * (2 * degrees) ** 0.5 + 4)


LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0, 2.5, float("-inf")])
PROBS = LOGITS.softmax(0)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    values, order = probs.sort(descending=True)
    kept = torch.zeros_like(probs)
    kept[order[values.cumsum(0) - values < top_p]] = 1
    return probs * kept / (probs * kept).sum()


def test_temperature():
    assert is_drawn_from(drawn(LOGITS[:5]), LOGITS[:5].softmax(0))
    assert is_drawn_from(drawn(LOGITS[:5], temperature=2.0), (LOGITS[:5] / 2).softmax(0))
    assert drawn(LOGITS[:5], temperature=0)[1] == 1
    assert drawn(LOGITS[:5], temperature=1e-320)[1] == 1
    assert is_drawn_from(drawn(LOGITS[:5], temperature=float("inf")), torch.full((5,), 0.2))


def test_truncation():
    logits = LOGITS[:5]
    probs = logits.softmax(0)
    top2 = probs * (probs >= probs.sort().values[-2])
    assert is_drawn_from(drawn(logits, top_k=2), top2 / top2.sum())
    assert is_drawn_from(drawn(logits, top_k=9), probs)
    for top_p in (0.3, 0.7, 0.95, 1.0):
        assert is_drawn_from(drawn(logits, top_p=top_p), nucleus(probs, top_p))
    assert is_drawn_from(drawn(logits, top_k=3, top_p=0.8), nucleus(nucleus(probs, 0.96), 0.8))
    kept = probs * (probs >= 0.2 * probs.max())
    assert is_drawn_from(drawn(logits, min_p=0.2), kept / kept.sum())


@pytest.mark.parametrize("vocab_size", [4 * NUCLEUS, 12 * NUCLEUS])
def test_flat_distributions_are_sorted_further(vocab_size):
    """top_p alone looks at the most likely tokens first; here they are not enough."""
    logits = torch.linspace(0, 1, vocab_size)
    shares = drawn(logits, count=1000, top_p=0.9)
    expected = nucleus(logits.softmax(0), 0.9)
    assert shares[expected == 0].sum() == 0
    beyond = logits < logits[-NUCLEUS]
    assert abs(shares[beyond].sum() - expected[beyond].sum()) < 0.06  # 4 standard deviations
    peaked = logits.clone()
    peaked[5] = 20.0
    rows = [Row(SamplingParams(top_p=0.9, seed=0), key) for key in range(6)]
    both = torch.stack([logits, peaked] * 3)
    together = sample(both, rows)
    assert together == [sample(both[i : i + 1], rows[i : i + 1])[0] for i in range(6)]


@pytest.mark.parametrize("options", [{}, {"min_p": 0.01}])
def test_tokens_that_compete_as_a_whole(options):
    """Those beyond the FEW most likely ones have a twentieth to a half of the probability."""
    for beyond in (0.05, 0.5):
        logits = torch.full((5 * FEW,), (beyond / FEW / (1 - beyond))).log()
        logits[::5] = -torch.arange(FEW) / FEW  # from 0 to -1
        logits[::5] -= logits[::5].logsumexp(0)
        logits[1::5], logits[2::5], logits[3::5] = -200, -300, -400  # never
        probs = logits.softmax(0)
        probs *= probs >= options.get("min_p", 0) * probs.max()
        groups = torch.arange(5 * FEW) % 5 * 8 + torch.arange(5 * FEW) * 8 // (5 * FEW)
        found, expected = (torch.zeros(40).index_add(0, groups, p) for p in (drawn(logits, 8000, **options), probs))
        assert is_drawn_from(found, expected / expected.sum(), 8000)
        assert bool((drawn(logits, 500, **options)[1::5] == 0).all())


def test_masks_hold_among_many_tokens():
    mask = torch.zeros(5 * FEW, dtype=torch.bool)
    mask[[7, 700]] = True
    rows = [Row(SamplingParams(), key, mask=mask) for key in range(200)]
    found = {s.token for s in sample(torch.randn(5 * FEW).expand(200, -1), rows)}
    assert found == {7, 700}


def test_a_row_does_not_depend_on_others():
    torch.manual_seed(0)
    logits = torch.randn(40, 7 * FEW)
    options = [
        {"temperature": 0}, {"top_k": 5}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.5}, {"min_p": 0.1}, {},
        {"repetition_penalty": 1.3, "top_k": 5}, {"presence_penalty": 1.0, "frequency_penalty": 0.3, "logprobs": 3},
    ]  # fmt: skip
    rows = [Row(SamplingParams(**options[i % 8]), i, [1, 2, 3], [4, 4, 5]) for i in range(40)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(40)]
    order = torch.randperm(40).tolist()
    assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_penalties_and_biases():
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5, 0.0])

    def chosen(**params):
        row = Row(SamplingParams(temperature=0, **params), prompt=[1], tokens=[2, 2, 0])
        (found,) = sample(logits[None], [row])
        return found

    assert chosen().token == 2
    # as OpenAI's: c · frequency + (c > 0) · presence
    assert chosen(frequency_penalty=0.6).token == 2  # 0.8, 0.4, 0.5
    assert chosen(frequency_penalty=0.8).token == 3
    assert chosen(presence_penalty=1.4).token == 2
    assert chosen(presence_penalty=1.6).token == 3
    # as in CTRL and transformers: prompt and answer; above 0 divided, below multiplied
    assert chosen(repetition_penalty=3.0).token == 2
    assert chosen(repetition_penalty=4.5).token == 3
    assert chosen(repetition_penalty=1e-3, logit_bias={0: -1e4, 2: -1e4}).token == 3
    assert chosen(logit_bias={4: 5.0}).token == 4
    assert logits.tolist() == [1.0, -1.0, 2.0, 0.5, 0.0]


def test_log_probabilities_are_of_the_model():
    row = Row(SamplingParams(temperature=0, logprobs=2, logit_bias={3: 100.0}))
    (found,) = sample(LOGITS[None, :5], [row])
    expected = LOGITS[:5].double().log_softmax(0)
    assert found.token == 3
    assert found.logprob == pytest.approx(float(expected[3]), abs=1e-6)
    assert [token for token, _ in found.top] == [1, 4]
    assert [logprob for _, logprob in found.top] == pytest.approx([float(expected[1]), float(expected[4])], abs=1e-6)


def test_masks():
    mask = torch.tensor([True, False, False, True, False])
    rows = [Row(SamplingParams(), key, mask=mask) for key in range(50)]
    assert {found.token for found in sample(LOGITS[:5].expand(50, -1), rows)} == {0, 3}


def test_rows_that_are_not_finite():
    logits = torch.zeros(4, 8)
    logits[1, 3], logits[2, 5], logits[3, 0] = float("nan"), float("inf"), float("-inf")
    found = sample(logits, [Row(SamplingParams(temperature=t)) for t in (0, 1, 1, 0)])
    assert [s is None for s in found] == [False, True, True, True]


def test_noise_is_gumbel_and_independent():
    """Mean 0.5772 and variance pi²/6; tokens, places and keys that follow each other have nothing in common."""
    n = 200
    keys, places, tokens = torch.arange(n)[:, None, None], torch.arange(20)[:, None], torch.arange(50)
    noise = gumbel(keys, places, tokens)
    assert noise.shape == (n, 20, 50)
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.015)
    assert noise.var().item() == pytest.approx(1.64493, abs=0.03)
    normal = (noise - noise.mean()) / noise.std()
    for dim in range(3):
        neighbours = (
            normal.narrow(dim, 1, normal.shape[dim] - 1) * normal.narrow(dim, 0, normal.shape[dim] - 1)
        ).mean()
        assert abs(neighbours) < 0.012
    assert len(noise.unique()) == noise.numel()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("temperature", -1), ("temperature", float("nan")),
        ("temperature", "1"), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", 2), ("repetition_penalty", 0),
        ("frequency_penalty", float("inf")), ("presence_penalty", None), ("seed", -1), ("seed", 2**64), ("stop", [""]),
        ("stop", [3]), ("stop_token_ids", ["a"]), ("logprobs", 101), ("n", 0), ("logit_bias", {3: float("nan")}),
        ("logit_bias", {"3": 1.0}), ("top_k", True),
    ],
)  # fmt: skip
def test_parameters_without_a_meaning(name, value):
    with pytest.raises(ParameterError, match=f"^{name} must be") as caught:
        SamplingParams(**{name: value})
    assert caught.value.name == name
