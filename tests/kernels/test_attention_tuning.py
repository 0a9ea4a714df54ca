"""The tiles of the Triton attention kernels: the table, the search, and that any tile gives the right result."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import IN_THE_INTERPRETER
from tests.kernels.attention_checks import check, check_decode, qkv

pytest.importorskip("triton")

from fastllm.kernels.attention import triton_tuning as tuning
from fastllm.kernels.attention.options import UNBOUNDED, Options


@pytest.mark.parametrize(
    "target", ["sm_80", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950"]
)
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq", "decode", "paged"])
def test_every_size_has_a_tile(target, kernel):
    for dim in (16, 32, 64, 128, 256):
        for itemsize in (2, 4):
            for more in (False, True):
                config = tuning.default(kernel, target, dim, itemsize, more)
                assert min(config.block_m, config.block_n) >= 16
                assert config.warps in (4, 8) and config.stages >= 1


def test_a_measured_tile_comes_before_the_table(monkeypatch):
    monkeypatch.setitem(tuning.MEASURED_TILES, ("a GPU", "dq", 64, False), (16, 32, 4, 1))
    table = tuning.default("dq", "sm_90", 32, 2, False)
    assert tuning.default("dq", "sm_90", 32, 2, False, "a GPU") == tuning.Config(16, 32, 4, 1) != table
    for more, itemsize, gpu in ((True, 2, "a GPU"), (False, 4, "a GPU"), (False, 2, "another")):
        given = "dq", "sm_90", 32, itemsize, more
        assert tuning.default(*given, gpu) == tuning.default(*given)
    assert tuning.gpu_name(torch.device("cpu")) == ""


def test_a_launch_asks_for_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(tuning.MEASURED_TILES, ("a GPU", "dq", 64, False), (16, 32, 4, 1))
    tuning.gpu_name.cache_clear()
    q = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), shape=q.shape, element_size=q.element_size)
    found = []
    tuning.launch("dq", on_gpu, on_gpu, Options(1.0, UNBOUNDED, 0, 0.0), "", found.append, ())
    tuning.gpu_name.cache_clear()
    assert found == [tuning.Config(16, 32, 4, 1)]


@IN_THE_INTERPRETER
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
        if len(tried) in (8, 10):  # each is called once before; as Triton's launch and its compiler's passes fail
            raise (tuning.triton.runtime.errors.OutOfResources(1, 0, "shared memory"), RuntimeError("PassManager"))[
                (len(tried) - 8) // 2
            ]
        return next(times, 9.0)

    monkeypatch.setenv("FASTLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning._cache.cache_clear()
    tuning._winners.cache_clear()
    start = tuning.Config(64, 64, 4, 2)
    found = tuning._tuned("forward 64", torch.device("cuda"), start, tried.append, ())
    assert found == tried[2] and tried[0] == start and len(tried) > 6
    (path,) = (tmp_path / "cache").iterdir()
    assert json.loads(path.read_text()) == {"forward 64": list(found)}
    tuning._winners.cache_clear()  # as a new process
    count = len(tried)
    assert tuning._tuned("forward 64", torch.device("cuda"), start, tried.append, ()) == found and len(tried) == count
    path.write_text("{ not JSON")
    tuning._winners.cache_clear()
    assert tuning._winners(path) == {}


def test_the_search_drops_what_computes_something_else(tmp_path, monkeypatch):
    """However fast it is; rounding and NaN where the default has -inf are no reason."""
    monkeypatch.setenv("FASTLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning._cache.cache_clear()
    tuning._winners.cache_clear()
    start, last = tuning.Config(64, 64, 4, 2), []
    out, lse = torch.empty(8, 8), torch.empty(8)

    def call(config: tuning.Config) -> None:
        last[:] = [config]
        out.fill_(float("nan") if config.specialized else 2.0 if config.block_m == 32 else 1.001)
        lse.fill_(-torch.inf)

    def bench(call) -> float:
        call()
        return 1.0 if last[0].block_n == 32 else 2.0

    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    special = (tuning.Config(128, 128, 4, 2, True),)
    with pytest.warns(UserWarning, match="another result and is left out") as warned:
        found = tuning._tuned("forward", torch.device("cuda"), start, call, (out, lse, None), special)
    assert found == tuning.Config(64, 32, 4, 2) and len(warned) == 2
