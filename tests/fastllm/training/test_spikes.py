from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.config import SpikeConfig
from fastllm.training.spikes import MIN_VALUES, SpikeDetector

CPU = torch.device("cpu")


def feed(detector: SpikeDetector, losses: list[float], norms: list[float] | None = None, start: int = 0) -> list[int]:
    """The steps that were spikes."""
    norms = norms or [1.0] * len(losses)
    found = []
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), start):
        if detector.step(i, torch.tensor(loss), torch.tensor(norm)).item():
            found.append(i)
    return found


def usual(count: int, mean: float = 3.0) -> list[float]:
    return (mean + 0.1 * torch.randn(count)).tolist()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["loss", "norm"])
def test_what_is_not_finite_is_a_spike_at_once(wrong, which):
    detector = SpikeDetector(SpikeConfig(), CPU)
    values = [3.0, wrong, 3.0]
    found = feed(detector, *((values, [1.0] * 3) if which == "loss" else ([3.0] * 3, values)))
    assert found == [1]
    found = detector.report()
    assert (found.count, found.recent) == (1, 1)
    assert (found.usual_loss, found.usual_grad_norm) == (3.0, 1.0 if which == "loss" else 3.0)
    assert not math.isfinite(found.loss if which == "loss" else found.grad_norm)
    assert detector.values.isfinite().sum() == 5  # what is not finite is not remembered


def guarded(**options: float) -> SpikeDetector:
    return SpikeDetector(SpikeConfig(**{"sigma": 6.0, **options}), CPU)


def test_by_default_only_what_is_not_finite_is_a_spike():
    assert feed(SpikeDetector(SpikeConfig(), CPU), [*usual(60), 1e6, math.nan], [*[1.0] * 60, 1e6, 1.0]) == [61]


def test_a_jump_of_both_is_a_spike_once_enough_is_known():
    for known, expected in ((MIN_VALUES - 1, []), (MIN_VALUES, [MIN_VALUES])):
        values = [*usual(known), 30.0, 3.0]
        assert feed(guarded(), values, values) == expected
    values = [*usual(MIN_VALUES), 1.0]
    assert feed(guarded(), values, values) == []  # downwards is welcome


def test_a_jump_of_one_alone_is_none():
    jump = [*usual(60), 1e6, *usual(5)]
    assert feed(guarded(), jump) == []
    assert feed(guarded(), usual(66), jump) == []


def test_rare_text_is_none():
    """Every 50th batch has twice the usual loss and three times the gradient norm."""
    losses, norms = usual(400), (1 + 0.1 * torch.randn(400)).tolist()
    losses[::50], norms[::50] = [6.0] * 8, [3.0] * 8
    assert feed(guarded(), losses, norms) == []


def test_heavy_tails_are_none():
    """Gradient norms of small batches: log-normal, the largest of 2,000 some 11 times the median."""
    torch.manual_seed(0)
    norms = (0.7 * torch.randn(2000)).exp().tolist()
    assert max(norms) > 8
    assert feed(guarded(), usual(2000), norms) == []


def test_a_small_rise_of_a_steady_loss_is_none():
    values = [3.0] * 60 + [3.0 + 0.9 * 6 * 0.05 * 3]
    assert feed(guarded(), values, values) == []


def test_one_spike_does_not_hide_the_next():
    values = [*usual(60), 1e6, *usual(5), 30.0, *usual(5)]
    assert feed(guarded(), values, values) == [60, 66]


def test_a_lasting_change_is_taken_for_granted_in_time():
    values = usual(128) + usual(200, mean=16.0)
    found = feed(guarded(), values, values)
    assert found
    assert found[-1] < 128 + 80


def test_the_window_forgets():
    detector = guarded(window=40)
    feed(detector, [*usual(35), math.nan, *usual(60)])
    found = detector.report()
    assert (found.count, found.recent) == (1, 0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_noise_of_any_size_is_no_spike(seed, scale):
    torch.manual_seed(seed)
    values = (scale * (3 + 0.5 * torch.randn(300))).tolist()
    assert feed(guarded(), values, values) == []


def test_state_goes_on_where_it_was():
    values = [*usual(50), 40.0, *usual(50), 50.0]
    whole, first, second = (guarded() for _ in range(3))
    expected = feed(whole, values, values)
    found = feed(first, values[:60], values[:60])
    for name, tensor in second.state_dict().items():
        tensor.copy_(first.state_dict()[name])
    assert found + feed(second, values[60:], values[60:], start=60) == expected == [50, 101]
