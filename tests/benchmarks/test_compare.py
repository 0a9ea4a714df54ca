"""What got slower: real changes, noise, and a machine that drifts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.cases import COPY, PYTORCH
from benchmarks.compare import compare, table
from benchmarks.record import Result, Row
from tests.benchmarks.made_up import BEFORE, FakeClock, rows, timed


def verdicts(before: list[Row], after: list[Row]) -> list[str]:
    return [c.verdict for c in compare(Result({}, rows=before), Result({}, rows=after))]


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (BEFORE, "same"),
        (BEFORE | {"fastllm cpu": 2.06}, "same"),  # less than is worth a word
        (BEFORE | {"fastllm cpu": 2.4}, "slower"),
        (BEFORE | {"fastllm cpu": 1.6}, "faster"),
        ({name: 1.5 * s for name, s in BEFORE.items()}, "same"),  # the machine was slower, for all
        ({COPY: 1.5, PYTORCH: 12.0, "fastllm cpu": 4.0}, "slower"),  # and we more than that
    ],
)
def test_verdicts(after, verdict):
    assert verdicts(rows(BEFORE), rows(after)) == [verdict]


def test_what_fails_now_is_said():
    after = [replace(r, error="OutOfMemoryError: no") if r.implementation == "fastllm cpu" else r for r in rows(BEFORE)]
    assert verdicts(rows(BEFORE), after) == ["fails"]
    assert verdicts(after, after) == [], "it failed before"
    theirs = [replace(r, error="no") if r.implementation == PYTORCH else r for r in rows(BEFORE)]
    assert verdicts(rows(BEFORE), theirs) == ["same"]
    assert "| fastllm cpu | fails | inf |" in table(compare(Result({}, rows=rows(BEFORE)), Result({}, rows=after)))


def test_noise_hides_what_it_could_have_made():
    after = BEFORE | {"fastllm cpu": 2.4}
    assert verdicts(rows(BEFORE, noise=0.3, rounds=5), rows(after, noise=0.3, rounds=5)) == ["same"]
    assert verdicts(rows(BEFORE, noise=0.3, rounds=500), rows(after, noise=0.3, rounds=500)) == ["slower"]


def test_a_run_differs_from_the_next_by_more_than_its_quartiles_tell():
    """Controls that drift apart by 8%, in nine of ten cases, excuse as much in ours, in the tenth too."""
    names = [PYTORCH, COPY, "fastllm cpu"]

    def run_of(change: float) -> list[Row]:
        found = rows(dict.fromkeys(names, 1.0))
        for n in range(9):
            apart = dict(zip(names, (1.04, 0.96, change), strict=True)) if change else dict.fromkeys(names, 1.0)
            found += [replace(r, size=str(n)) for r in rows(apart)]
        return found

    for ours, verdict in ((1.15, "same"), (1.6, "slower"), (0.6, "faster")):
        assert verdicts(run_of(0), run_of(ours))[1:] == [verdict] * 9
    alone = rows({PYTORCH: 1.0, COPY: 1.0, "fastllm cpu": 1.15})
    assert verdicts(run_of(0), [*alone, *run_of(1.0)[3:]])[0] == "same"


def test_pure_noise_is_rarely_called_a_change():
    """Rounds drawn from one distribution, twice: three standard errors leave a few in a thousand."""
    draw = random.Random(0)

    def measured() -> list[Row]:
        def calls(clock: FakeClock) -> dict[str, Callable[[], Any]]:
            return {n: lambda s=s: clock.wait(s * math.exp(draw.gauss(0, 0.1))) for n, s in BEFORE.items()}

        return timed(calls, seconds=11 * 20)

    found = [verdict for _ in range(200) for verdict in verdicts(measured(), measured())]
    assert found.count("same") >= 196


def test_comparison_on_the_command_line(tmp_path, capsys):
    for name, seconds in (("a", BEFORE), ("b", BEFORE | {"fastllm cpu": 3.0})):
        Result({}, rows=rows(seconds)).write(tmp_path / f"{name}.json")
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert command.main(["--compare", *paths]) == 1
    assert "| fastllm cpu | slower | 1.50 |" in capsys.readouterr().out
    assert command.main(["--compare", *reversed(paths)]) == 0
    assert "0 slower, 1 faster, 0 same" in capsys.readouterr().out
    assert "| slower |" not in table([])
