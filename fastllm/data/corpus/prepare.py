"""From sources to a corpus: read and clean, find duplicates over all of them, write shards and the report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import console
from ...errors import UserError
from ...files import write_atomic
from ...input_files import read_json
from ...run_lock import LOCK, run_lock
from ..folders import refuse_own
from ..progress import progress
from ..readers import Seen, open_source
from .parts import Files
from .recipe import Recipe
from .shards import REPORT, read_report
from .stages import PLAN, Preparation

PROCESSES = 4  # for each core, at most


@dataclass(frozen=True)
class Outcome:
    """The report of a preparation, and the number of damaged places, which it lists."""

    report: dict[str, Any]
    problems: int


def prepare(recipe: Recipe, out: Path, processes: int | None = None) -> Outcome:
    """Make the corpus ``out`` as ``recipe`` says: shards of JSON lines in zstd, report.json, report.md and a picture.

    A preparation that was interrupted continues where it was; one that is finished is not done again. Damaged files
    and records are listed in the report, and the rest goes on.

    Args:
        recipe: sources, filters and duplicates.
        out: the folder, new, empty, or of an earlier call with the same recipe.
        processes: that clean documents; None: one for each core.

    Raises:
        UserError: no source can be used, or ``out`` holds something else or can't be written to.
    """
    cores = len(os.sched_getaffinity(0))
    if processes is not None and not 0 < processes <= PROCESSES * cores:
        raise UserError(f"--processes must be from 1 to {PROCESSES * cores} on {cores} cores, it is {processes}")
    preparation = Preparation(recipe, open_files(recipe), out)
    began = time.monotonic()
    with begun(preparation) as anything:
        if not anything:
            console.say("corpus", f"{out} is complete already; remove it to prepare it again")
            report = read_report(out)
            return Outcome(report, report["problems"])
        if done := sum(part.documents for part in preparation.parts()):
            console.say("continuing", f"{done:,} documents are done")
        with progress("cleaning", 0) as bar:
            count = [0, 0]

            def tick(documents: int, size: int) -> None:
                count[0] += documents
                count[1] += size
                bar.enter(f"cleaning: {count[0]:,} documents from {count[1] / 1e6:,.0f} MB")
                bar.advance(1)

            preparation.clean(0, processes or cores, tick)
        with progress("near duplicates", preparation.bands + 1) as bar:
            for band in range(preparation.bands):
                preparation.buckets(band)
                bar.advance(1)
            preparation.decide()
        with progress("shards", len(preparation.parts())) as bar:
            preparation.shards(tick=bar.advance)
        report = preparation.finish(time.monotonic() - began)
    return Outcome(report, report["problems"])


def open_files(recipe: Recipe) -> Files:
    """Every file of the recipe's sources, in their order, each once."""
    if not recipe.sources:
        raise UserError("there is no source: name a file, a folder or a URL")
    files, seen = [], Seen()
    for number, spec in enumerate(recipe.sources):
        for path in spec.paths():
            refuse_own(path)
            files += [(number, source) for source in open_source(path, recipe.readers, seen)]
    if left_out := str(seen.left_out):
        console.say("", f"left out: {left_out}")
    if not files:
        raise UserError(f"there is nothing to read in {', '.join(spec.label for spec in recipe.sources)}")
    return files


@contextmanager
def begun(preparation: Preparation) -> Iterator[bool]:
    """Hold the folder, which says in its plan what is made in it. Gives False where that is complete.

    Raises:
        UserError: it holds something else, or another process holds it.
    """
    out, plan = preparation.out, _plan(preparation)
    if not _is_complete(preparation, plan):  # before anything is written
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't use the folder {out}: {error.strerror}") from None
        with run_lock(out, "preparation"):
            if not _is_complete(preparation, plan):  # now that no other process changes it
                for left in out.glob(".*.part"):  # of a process that was killed
                    left.unlink()
                write_atomic(out / PLAN, json.dumps(plan).encode())
                preparation.work.mkdir(exist_ok=True)
                yield True
                return
    shutil.rmtree(preparation.work, ignore_errors=True)  # of a process that was killed at its end
    yield False


def _plan(preparation: Preparation) -> dict[str, Any]:
    """What the corpus depends on."""
    recipe = preparation.recipe
    files = [[source.name, *_state(getattr(source, "path", source.name))] for _, source in preparation.files]
    evaluations = [[name, *_state(name)] for name in recipe.decontamination.files] if recipe.decontaminates else []
    return {"recipe": recipe.fingerprint, "tasks": preparation.tasks, "files": files, "evaluations": evaluations}


def _is_complete(preparation: Preparation, plan: dict[str, Any]) -> bool:
    """UserError where the folder holds something else. One without any work that is done may have any plan."""
    out = preparation.out
    try:
        names = {path.name for path in out.iterdir() if path.suffix != ".part"} if out.exists() else set()
    except OSError as error:
        raise UserError(f"can't use the folder {out}: {error.strerror}") from None
    if names <= {LOCK}:
        return False
    if PLAN not in names:
        raise UserError(f"{out} is not empty: choose another folder with --out")
    before = read_json(out / PLAN, limit=2**28)
    done = REPORT in names or "datatrove" in names or any(preparation.work.glob("task-*/*.json"))
    if before != plan and (done or before.keys() != plan.keys()):
        changed = next((key for key in plan if before.get(key) != plan[key]), "recipe")
        what = {"recipe": "settings", "tasks": "tasks", "evaluations": "evaluation files"}.get(
            changed, "files, or files that have changed"
        )
        raise UserError(f"{out} was prepared from other {what}: choose another folder with --out, or remove it")
    return REPORT in names


def _state(name: str) -> list[int]:
    """Size and time of a file, by which a rerun sees that it is the same one."""
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_mtime_ns]
