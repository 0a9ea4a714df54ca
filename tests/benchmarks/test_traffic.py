"""The account of what row kernels read and write, of which the emulator counts the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastllm.benchmarks import traffic

LONG = (65536, 131072, 262144)


@pytest.mark.parametrize("dtype", traffic.DTYPES, ids=str)
@pytest.mark.parametrize("cols", traffic.WIDTHS)
@pytest.mark.parametrize("name", traffic.PASSES)
def test_every_tensor_is_read_or_written_once(name, cols, dtype):
    counted = traffic.count(name, cols, dtype, traffic.CLUSTERS)
    assert set(counted.reads.values()) == {1.0} and set(counted.writes.values()) <= {1.0}
    assert not any("loop" in launch.kernel or "columns" in launch.kernel for launch in counted.launches)


@pytest.mark.parametrize("name", traffic.HOLDING)
def test_without_clusters_long_rows_are_read_again(name):
    counted = traffic.count(name, 65536, torch.bfloat16, traffic.NO_CLUSTERS)
    times = 3.0 if name == "RMSNorm backward" else 2.0
    assert set(counted.reads.values()) == {times} and set(counted.writes.values()) == {1.0}
    assert "loop" in counted.launches[0].kernel


@pytest.mark.parametrize("dtype", traffic.DTYPES, ids=str)
def test_clusters(dtype):
    """Of blocks that have up to 64 KiB of a row, half of that of each of two tensors (all where none else fits)."""
    for name in traffic.HOLDING:
        for cols in traffic.WIDTHS:
            first = traffic.count(name, cols, dtype, traffic.CLUSTERS).launches[0]
            tight = (32 if "backward" in name else 64) << 10
            size = max(1, cols * dtype.itemsize // tight)
            assert first.cluster == min(16, size)


def test_few_rows_of_logits_are_shared():
    """By two blocks for each of the emulator's four multiprocessors; where there are no clusters, backward alone."""
    for name, alone in (("cross-entropy", 2), ("cross-entropy backward", 8)):
        for device, blocks in ((traffic.CLUSTERS, 8), (traffic.NO_CLUSTERS, alone)):
            assert traffic.count(name, 131072, torch.bfloat16, device).launches[0].blocks == blocks


def test_a_second_read_comes_from_memory_where_l2_does_not_hold_the_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traffic, "resident_blocks", lambda kernel: 1)
    found = [
        traffic.from_memory(traffic.count("softmax", cols, torch.bfloat16, traffic.NO_CLUSTERS), cols, torch.bfloat16)
        for cols in LONG
    ]
    assert found == [1.0, 1.0, 1.5]  # 17, 35 and 69 MB in 50 MB


def test_the_readme_shows_it(capsys: pytest.CaptureFixture[str]):
    try:
        traffic.main()
    except LookupError as error:
        pytest.skip(str(error))
    readme = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "README.md"
    assert capsys.readouterr().out in readme.read_text()
