"""The account of linear_cross_entropy: its anchor, what it decides, and the tables that the README shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import heads
from benchmarks.heads import Head, chunked


def rate(head: Head, seconds: float, products: int = 3) -> float:
    return products * head.product / seconds / 1e12


def test_the_anchor():
    """Liger kernel on an H100."""
    head = Head(16384, 4096, 131072)
    assert rate(head, chunked(head, 2048, backward=False), 1) == pytest.approx(720, rel=0.03)
    assert 666 <= rate(head, chunked(head, 2048)) <= 1.03 * 701


def test_the_bytes_of_small_chunks():
    """A chunk of one tile: the weight is read twice, its sum read and written; logits stay in L2."""
    head = Head(16384, 4096, 32000)
    weight = 2 * 4096 * 32000
    assert chunked(head, 128) == pytest.approx(16384 / 128 * 4 * weight / heads.BANDWIDTH, rel=0.02)


@pytest.mark.parametrize("head", heads.HEADS, ids=str)
def test_the_decisions(head):
    best = min(chunked(head, chunk) for chunk in heads.CHUNKS)
    assert chunked(head, 2048) < 1.01 * best and chunked(head, 2048) < heads.fused(head) < 2 * chunked(head, 2048)
    assert chunked(head, 2048) < heads.eager(head)
    assert chunked(head, 2048, "float32") < 0.9 * chunked(head, 2048, "float32, added apart")


def test_the_readme_shows_it(capsys: pytest.CaptureFixture[str]):
    heads.main()
    readme = (Path(__file__).resolve().parents[2] / "kernels" / "loss" / "README.md").read_text()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2 and all(table in readme for table in tables)
