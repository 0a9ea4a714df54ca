"""The cycle account of attention: its anchor, and the table that the README shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm.benchmarks import cycles


def test_the_anchor():
    """FlashAttention-2 on an A100, forward, head dimension 128: Dao 2023 measured up to 225 TFLOP/s."""
    (a100,) = (gpu for gpu in cycles.GPUS if gpu.name == "A100")
    assert a100.peak == pytest.approx(312, rel=0.01)
    assert cycles.tflops(a100, [cycles.FLASH_ATTENTION_2], 2) == pytest.approx(225, rel=0.1)


def test_floors():
    """Of 128 queries and 64 keys at 128: 2 · 128 · 64 · 128 multiply-adds at 1024 a cycle, an exponential a score."""
    (a100,) = (gpu for gpu in cycles.GPUS if gpu.name == "A100")
    bounds = cycles.FLASH_ATTENTION_2.cycles(a100)
    blocks = cycles.FLASH_ATTENTION_2.blocks
    assert bounds["tensor"] == blocks * 2 * 128 * 64 * 128 / 1024
    assert bounds["exponentials"] == blocks * 128 * 64 / 16
    assert bounds["expected"] > bounds["tensor"]


def test_the_readme_shows_it(capsys: pytest.CaptureFixture[str]):
    cycles.main()
    readme = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "README.md"
    assert capsys.readouterr().out in readme.read_text()
