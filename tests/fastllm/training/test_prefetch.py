"""A thread reads coming steps: the same results, errors where they are asked for, and a clean end."""

from __future__ import annotations

import threading
import time

import pytest

from fastllm.distributed.mesh import process_group
from fastllm.errors import UserError
from fastllm.training.metrics import read_log
from fastllm.training.prefetch import AHEAD, Prefetcher
from tests.fastllm import small_run
from tests.limits import HANG


def threads() -> int:
    return sum(thread.name == "fastllm-prefetch" for thread in threading.enumerate())


def wait_for(done) -> None:
    end = time.monotonic() + HANG
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_results_come_in_order_and_are_made_ahead():
    made: list[int] = []
    with Prefetcher(lambda index: made.append(index) or index * 10, 5) as prefetch:  # type: ignore[func-returns-value]
        assert prefetch.get(5) == 50
        wait_for(lambda: len(made) >= 1 + AHEAD)
        assert [prefetch.get(index) for index in (10, 15, 20)] == [100, 150, 200]
        assert made[:4] == [5, 10, 15, 20]
        assert prefetch.get(100) == 1000  # after a rollback or a resume
        assert prefetch.get(105) == 1050
    assert threads() == 0
    assert prefetch.get(7) == 70  # in this thread
    assert threads() == 0


def test_an_error_is_raised_where_its_result_is_asked_for():
    def make(index: int) -> int:
        if index == 2:
            raise UserError("damaged")
        return index

    with Prefetcher(make, 1) as prefetch:
        assert prefetch.get(0) == 0
        wait_for(lambda: threads() == 0)  # it has met the error, of which step 1 knows nothing
        assert prefetch.get(1) == 1
        with pytest.raises(UserError, match="damaged"):
            prefetch.get(2)
        assert prefetch.get(3) == 3  # a new one, from there
    assert threads() == 0


def test_an_interrupted_block_ends_the_thread():
    prefetch = Prefetcher(lambda index: index, 1)

    def interrupted() -> None:
        with prefetch:
            prefetch.get(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threads() == 0


def test_a_run_has_the_same_numbers_without_it(tmp_path, monkeypatch):
    curves = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(Prefetcher, "__enter__", lambda self: self)
        with process_group(small_run.CPU):
            small_run.make(small_run.config(), tmp_path / name).run()
        records = read_log(tmp_path / name / "log.jsonl")
        curves.append([(r["loss"], r["grad_norm"], r["tokens"]) for r in records if "loss" in r])
        assert threads() == 0
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]


def test_data_that_fails_in_the_middle_of_a_run(tmp_path):
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(), tmp_path)
        batch = trainer.data.batch

        def fail(index: int, n: int):
            if index >= 15:
                raise UserError("shard 3 is damaged")
            return batch(index, n)

        trainer.data.batch = fail  # type: ignore[method-assign]
        with pytest.raises(UserError, match="shard 3 is damaged"):
            trainer.run()
    assert trainer.state.step == 3
    assert threads() == 0
