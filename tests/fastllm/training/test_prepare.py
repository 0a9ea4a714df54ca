"""What a run is made from: the warning about text that is read too often."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fastllm.config import Config, TrainConfig
from fastllm.planning.presets import preset
from fastllm.training.pretrain import repetition_warning


@pytest.mark.parametrize("tokens", [3_200_000, 400_000, 20_000])
def test_reasonable_numbers_get_no_warning(tokens):
    assert repetition_warning(Config(), tokens) == ""


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (preset("124m"), 1_300_000),
        (preset("70b"), 10**9),
        (replace(Config(), train=TrainConfig(steps=10**6)), 400_000),
        (Config(), 257),
    ],
)
def test_text_that_is_read_very_often(config, tokens):
    warning = repetition_warning(config, tokens)
    times = config.train.steps * config.train.global_batch_tokens / tokens
    assert f"{times:,.0f} times over" in warning
    assert f"({tokens:,} tokens)" in warning
    found = re.search(r"--train\.steps ([\d,]+) reads it ([\d,]+) times", warning)
    assert found is not None
    fewer, reads = (int(number.replace(",", "")) for number in found.groups())
    assert 1 <= fewer < config.train.steps
    assert abs(fewer * config.train.global_batch_tokens / tokens - reads) <= 1
    assert "\n" not in warning
