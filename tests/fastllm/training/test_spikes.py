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


def test_a_jump_is_a_spike_once_enough_is_known():
    assert feed(SpikeDetector(SpikeConfig(), CPU), [*usual(MIN_VALUES - 1), 30.0, 3.0]) == []
    assert feed(SpikeDetector(SpikeConfig(), CPU), [*usual(MIN_VALUES), 30.0, 3.0]) == [MIN_VALUES]
    assert feed(SpikeDetector(SpikeConfig(), CPU), usual(MIN_VALUES + 1), [*usual(MIN_VALUES), 30.0]) == [MIN_VALUES]
    assert feed(SpikeDetector(SpikeConfig(), CPU), [*usual(MIN_VALUES), 1.0]) == []  # downwards is welcome


def test_a_small_rise_of_a_steady_loss_is_none():
    assert feed(SpikeDetector(SpikeConfig(), CPU), [3.0] * 60 + [3.0 + 0.9 * 6 * 0.05 * 3]) == []


def test_one_spike_does_not_hide_the_next():
    assert feed(SpikeDetector(SpikeConfig(), CPU), [*usual(60), 1e6, *usual(5), 30.0, *usual(5)]) == [60, 66]


def test_a_lasting_change_is_taken_for_granted_in_time():
    found = feed(SpikeDetector(SpikeConfig(), CPU), usual(128) + usual(200, mean=6.0))
    assert found
    assert found[-1] < 128 + 40


def test_the_window_forgets():
    detector = SpikeDetector(SpikeConfig(window=40), CPU)
    feed(detector, [*usual(35), math.nan, *usual(60)])
    found = detector.report()
    assert (found.count, found.recent) == (1, 0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_noise_of_any_size_is_no_spike(seed, scale):
    torch.manual_seed(seed)
    values = (scale * (3 + 0.5 * torch.randn(300))).tolist()
    assert feed(SpikeDetector(SpikeConfig(), CPU), values, values) == []


def test_state_goes_on_where_it_was():
    values = [*usual(50), 40.0, *usual(50), 50.0]
    whole, first, second = (SpikeDetector(SpikeConfig(), CPU) for _ in range(3))
    expected = feed(whole, values)
    found = feed(first, values[:60])
    for name, tensor in second.state_dict().items():
        tensor.copy_(first.state_dict()[name])
    assert found + feed(second, values[60:], start=60) == expected == [50, 101]
