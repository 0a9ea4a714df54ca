"""The tiles of the Triton attention kernels: the table, the search, and that any tile gives the right result."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import GPU
from tests.kernels.attention_checks import check, check_decode, qkv

pytest.importorskip("triton")

from fastllm.kernels.attention import triton_tuning as tuning


@pytest.mark.parametrize(
    "target", ["sm_80", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950"]
)
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq", "decode"])
def test_every_size_has_a_tile(target, kernel):
    for dim in (16, 32, 64, 128, 256):
        for itemsize in (2, 4):
            for more in (False, True):
                config = tuning.default(kernel, target, dim, itemsize, more)
                assert set(config) == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}
                assert min(config["BLOCK_M"], config["BLOCK_N"]) >= 16


@pytest.mark.skipif(GPU, reason="the interpreter is off where there is a GPU; tests marked gpu run the kernel itself")
@pytest.mark.parametrize("tile", [(16, 64), (32, 32), (128, 16)], ids=str)
def test_tiles_of_any_shape(tile, monkeypatch):
    monkeypatch.setattr(tuning, "_INTERPRETER", (*tile, 4, 1))
    for options in ({}, {"causal": False}, {"window": 40, "softcap": 3.0}):
        check(qkv(90, 150, 2, 1, 24, torch.bfloat16, batch=1), "triton", **options)
    q, k, v = qkv(3, 200, 4, 1, 24)
    check_decode(q, k, v, torch.tensor([200, 77]), "triton", window=90)


def test_the_search_keeps_its_winner(tmp_path, monkeypatch):
    """The fastest of the candidates, found once, kept on disk, and read again by the next process."""
    times = iter([3.0, 1.0, 2.0])
    tried = []

    def bench(call):
        call()
        if len(tried) == 4:
            raise tuning.triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return next(times, 9.0)

    monkeypatch.setenv("FASTLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning._cache.cache_clear()
    tuning._winners.cache_clear()
    start = tuning._config(64, 64, 4, 2)
    found = tuning._tuned("forward 64", torch.device("cuda"), start, tried.append)
    assert found == tried[1] and tried[0] == start and len(tried) > 4
    (path,) = (tmp_path / "cache").iterdir()
    assert json.loads(path.read_text()) == {"forward 64": list(found.values())}
    tuning._winners.cache_clear()  # as a new process
    count = len(tried)
    assert tuning._tuned("forward 64", torch.device("cuda"), start, tried.append) == found and len(tried) == count
    path.write_text("{ not JSON")
    tuning._winners.cache_clear()
    assert tuning._winners(path) == {}
