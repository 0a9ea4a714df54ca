"""From sources to a corpus: read and clean, find duplicates over all of them, write shards and the report."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import console
from ...errors import UserError
from ...files import write_atomic
from ...input_files import read_json
from ...run_lock import run_lock
from ..progress import progress
from ..readers import Seen, open_source
from .parts import Files
from .recipe import Recipe
from .shards import REPORT
from .stages import PLAN, Preparation


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
    preparation = Preparation(recipe, open_files(recipe), out)
    if not begin(preparation):
        console.say("corpus", f"{out} is complete already; remove it to prepare it again")
        report = read_json(out / REPORT, limit=2**28)
        return Outcome(report, report["problems"])
    began = time.monotonic()
    with run_lock(out, "preparation"):
        if done := sum(part.documents for part in preparation.parts()):
            console.say("continuing", f"{done:,} documents are done")
        with progress("cleaning", 0) as bar:
            count = [0, 0]

            def tick(documents: int, size: int) -> None:
                count[0] += documents
                count[1] += size
                bar.enter(f"cleaning: {count[0]:,} documents from {count[1] / 1e6:,.0f} MB")
                bar.advance(1)

            preparation.clean(0, processes or len(os.sched_getaffinity(0)), tick)
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
            files += [(number, source) for source in open_source(path, recipe.readers, seen)]
    if left_out := str(seen.left_out):
        console.say("", f"left out: {left_out}")
    if not files:
        raise UserError(f"there is nothing to read in {', '.join(spec.label for spec in recipe.sources)}")
    return files


def begin(preparation: Preparation) -> bool:
    """Make the folder, or check that it is of the same preparation. False: that is complete."""
    out, work = preparation.out, preparation.work
    files = [[source.name, *_state(source.name)] for _, source in preparation.files]
    plan = {"recipe": preparation.recipe.fingerprint, "tasks": preparation.tasks, "files": files}
    try:
        if not out.exists() or not any(out.iterdir()):
            work.mkdir(parents=True)
            write_atomic(work / PLAN, json.dumps(plan).encode())
            return True
    except OSError as error:
        raise UserError(f"can't use the folder {out}: {error.strerror}") from None
    complete = (out / REPORT).exists()
    path = (out if complete else work) / PLAN
    if not path.exists():
        raise UserError(f"{out} is not empty: choose another folder with --out")
    before = read_json(path, limit=2**28)
    if before != plan:
        changed = next(key for key in plan if before.get(key) != plan[key])
        what = {"recipe": "settings", "tasks": "tasks"}.get(changed, "files, or files that have changed")
        raise UserError(f"{out} was prepared from other {what}: choose another folder with --out, or remove it")
    return not complete


def _state(name: str) -> list[int]:
    """Size and time of a file, by which a rerun sees that it is the same one."""
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_mtime_ns]
