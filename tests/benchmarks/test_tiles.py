"""The search for tiles: what is tried, that it is checked and timed alone, and what becomes of the winners."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from triton.runtime.errors import InterpreterError

from benchmarks import apart, defaults, tiles
from benchmarks.tiles import Launch, Shape, Tile
from fastllm.kernels.attention import triton_tuning
from tests.benchmarks.made_up import FakeGpu
from tests.conftest import GPU

SMALL = Shape(1, 64, 128, 96)
FOUND = [
    Tile("dq", 64, (64, 64, 4, 2, False), 1e9, error="OutOfResources: shared|memory"),
    Tile("dq", 64, (128, 64, 8, 2, False), 1e9, 2e-3, 1.9e-3, 2.1e-3),
    Tile("dq", 64, (128, 64, 4, 2, False), 1e9, 1e-3, 1e-3, 1e-3),
    Tile("decode", 128, (64, 64, 8, 3, False), 1e9, 1.01e-3, 1e-3, 1.1e-3),
    Tile("decode", 128, (64, 64, 4, 3, False), 1e9, 1e-3, 1e-3, 1e-3),
    Tile("forward", 256, (64, 64, 8, 2, False), 1e9, error="no"),
]


def test_six_to_eleven_tiles_of_each_the_tables_first(monkeypatch):
    monkeypatch.setattr(triton_tuning, "architecture", lambda device: "sm_90")
    found = tiles.tiles()
    assert [t.dim for t in found] == sorted((t.dim for t in found), key=tiles.DIMS.index)
    for kernel in tiles.KERNELS:
        for dim in tiles.DIMS:
            group = [t.tile for t in found if (t.kernel, t.dim) == (kernel, dim)]
            assert 6 <= len(set(group)) == len(group) <= 11
            assert group[0] == (*triton_tuning.default(kernel, "sm_90", dim, 2, False),)
            special = triton_tuning.specialized(kernel, "sm_90", dim, False)
            assert group[1 : 1 + len(special)] == [*map(tuple, special)]
            for m, n, warps, stages, _ in group:
                assert {m, n} <= {16, 32, 64, 128, 256} and warps in (4, 8) and 1 <= stages <= 4
    assert {t.kernel for t in tiles.tiles(("dq",), (64,))} == {"dq"}


@pytest.mark.skipif(GPU, reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_a_tile_is_checked(kernel, monkeypatch):
    """In Triton's interpreter: the tile arrives in the kernel, and a wrong result is an error."""
    launch = tiles.prepared.__wrapped__(kernel, 64, SMALL)
    default = triton_tuning.default
    tiles.check(kernel, (16, 32, 4, 1, False), launch)
    assert triton_tuning.default is default
    with pytest.raises(AssertionError, match="wrong result: error 5"):
        tiles.check(kernel, (16, 32, 4, 1, False), launch._replace(expected=[2 * t for t in launch.expected]))

    def asks() -> None:
        """And writes nothing."""
        triton_tuning.default(kernel, "cpu", 64, 2, False)

    with pytest.raises(AssertionError, match="wrong result: error nan"):
        tiles.check(kernel, (16, 32, 4, 1, False), launch._replace(call=asks))
    with pytest.raises(AssertionError, match="was not asked"):
        tiles.check(kernel, (16, 32, 4, 1, False), launch._replace(call=lambda: None))
    with pytest.raises(InterpreterError, match="arange"):
        tiles.check(kernel, (16, 33, 4, 1, False), launch)
    assert triton_tuning.default is default


def test_a_kernel_is_timed_alone(monkeypatch):
    gpu, used = FakeGpu(monkeypatch), []

    def call() -> None:
        gpu.launch(3e-5, 7e-4)
        for kernel, seconds in (("dkdv", 5e-3), ("dq", 3e-3)):
            used.append((kernel, (*triton_tuning.default(kernel, "sm_90", 64, 2, False),)))
            gpu.launch(3e-5, seconds)

    for kernel, seconds in (("dkdv", 5e-3), ("dq", 3e-3)):
        used.clear()
        found = tiles.measure(kernel, (16, 16, 4, 1, False), Launch(call, [], []))
        assert found == pytest.approx({"seconds": seconds, "low": seconds, "high": seconds})
        assert {tile for name, tile in used if name == kernel} == {(16, 16, 4, 1, False)}
        assert all(tile != (16, 16, 4, 1, False) for name, tile in used if name != kernel)


def test_the_fastest_wins_where_it_is_worth_it():
    assert tiles.winners(FOUND) == {("dq", 64): (128, 64, 4, 2, False), ("decode", 128): (64, 64, 8, 3, False)}
    text = tiles.table(FOUND)
    assert "| dq | 64 | 128×64, 4 warps, 2 stages | 1 | 0 | 1 TFLOP/s | **the fastest** |" in text
    assert "| dq | 64 | 64×64, 4 warps, 2 stages |  | |  | OutOfResources: shared/memory |" in text
    assert "| decode | 128 | 64×64, 8 warps, 3 stages | 1.01 | 0.05 | 990 GB/s | **the fastest** |" in text


def test_winners_become_the_defaults(tmp_path, monkeypatch):
    folder = tmp_path / "a-gpu"
    folder.mkdir()
    monkeypatch.setattr(tiles, "stamp", lambda: {"gpu": "a GPU", "device": "a-gpu"})
    tiles.write(FOUND, folder)
    assert tiles.read(folder / tiles.FILE) == ({"gpu": "a GPU", "device": "a-gpu"}, FOUND)
    monkeypatch.setattr(defaults, "FOLDER", tmp_path)
    space: dict[str, dict] = {}
    exec(defaults.text(), space)
    assert space["MEASURED_TILES"] == {
        ("a GPU", "decode", 128, False): (64, 64, 8, 3, False), ("a GPU", "dq", 64, False): (128, 64, 4, 2, False),
    }  # fmt: skip


def test_the_search_continues_after_an_error(tmp_path, monkeypatch, capsys):
    child = tmp_path / "child.py"
    child.write_text(f"""
import os, sys
sys.path.insert(0, {str(apart.ROOT)!r})
from benchmarks import apart

def bad():
    raise RuntimeError("PassManager::run failed")

first, crashes, last = {[t.name for t in FOUND[:3]]!r}
times = lambda s: (lambda: {{"seconds": s, "low": s, "high": s}})
jobs = {{first: bad, crashes: lambda: os._exit(1), last: times(1e-3)}}
if sys.argv[1] == "--compile":
    jobs[first] = dict
sys.exit(apart.work(jobs, sys.argv[2:]))
""")
    monkeypatch.setattr(tiles, "WORKERS", 1)
    planned = [replace(FOUND[n], error="", seconds=0.0) for n in range(3)]
    command = [sys.executable, str(child)]
    assert tiles.search(planned, command, tmp_path, 600.0) == 0
    _, found = tiles.read(tmp_path / tiles.FILE)
    assert [t.error for t in found] == ["RuntimeError: PassManager::run failed", "the process ended (exit 1)", ""]
    assert "1 of 3 tiles measured, 2 failed" in capsys.readouterr().out
    assert tiles.winners(found) == {("dq", 64): (128, 64, 4, 2, False)}
