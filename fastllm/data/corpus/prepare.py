"""From sources to a corpus: read and clean, find duplicates over all of them, write shards and the report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from ... import __version__, console
from ...errors import UserError
from ...files import atomic, write_atomic
from ...input_files import read_json
from ...run_lock import run_lock
from ..deduplication import exact_duplicates, near_duplicates
from ..document import Document
from ..progress import progress
from ..readers import open_source
from .parts import Files, Part, complete_parts, make_parts
from .recipe import Recipe
from .report import make_report, write_report
from .shards import REPORT, SAMPLES, read_lines
from .tally import SAMPLES as FEW
from .tally import Tally, sample
from .worker import LEVEL

PLAN = "plan.json"


@dataclass(frozen=True)
class Outcome:
    """Of a preparation."""

    report: dict[str, Any]
    problems: int  # damaged files and records, which the report lists

    @property
    def documents(self) -> int:
        return self.report["documents"]


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
    if not recipe.sources:
        raise UserError("there is no source: name a file, a folder or a URL")
    files = open_files(recipe)
    plan = {"recipe": recipe.fingerprint, "files": [[source.name, *_state(source.name)] for _, source in files]}
    work = out / "work"
    _check_folder(out, work, plan)
    if (out / REPORT).exists():
        report = read_json(out / REPORT, limit=2**28)
        console.say("corpus", f"{out} is complete already; remove it to prepare it again")
        return Outcome(report, report["problems"])
    work.mkdir(parents=True, exist_ok=True)
    with run_lock(out, "preparation"):
        write_atomic(work / PLAN, json.dumps(plan).encode())
        return _prepare(recipe, files, out, work, processes or len(os.sched_getaffinity(0)))


def open_files(recipe: Recipe) -> Files:
    """Every file of the recipe's sources, in their order, each once."""
    files, seen = [], set()
    for number, spec in enumerate(recipe.sources):
        for path in spec.paths():
            for source in open_source(path, recipe.readers):
                if source.name not in seen:
                    seen.add(source.name)
                    files.append((number, source))
    return files


def _state(name: str) -> list[int]:
    """Size and time of a file, by which a rerun sees that it is the same one."""
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_mtime_ns]


def _check_folder(out: Path, work: Path, plan: dict[str, Any]) -> None:
    """Raise UserError unless ``out`` is new, empty, or of the same plan."""
    try:
        if not out.exists() or not any(out.iterdir()):
            return
    except OSError as error:
        raise UserError(f"can't use the folder {out}: {error.strerror}") from None
    path = out / PLAN if (out / PLAN).exists() else work / PLAN
    if not path.exists():
        raise UserError(f"{out} is not empty: choose another folder with --out")
    before = read_json(path, limit=2**28)
    if before != plan:
        what = "settings" if before.get("recipe") != plan["recipe"] else "files, or files that have changed"
        raise UserError(f"{out} was prepared from other {what}: choose another folder with --out, or remove it")


def _prepare(recipe: Recipe, files: Files, out: Path, work: Path, processes: int) -> Outcome:
    began = time.monotonic()
    done = complete_parts(work)
    if done:
        console.say("continuing", f"{sum(part.documents for part in done):,} documents are done")
    with progress("prepare", 0) as bar:
        count = [0, 0]

        def tick(documents: int, size: int) -> None:
            count[0] += documents
            count[1] += size
            bar.enter(f"prepare: {count[0]:,} documents from {count[1] / 1e6:,.0f} MB")
            bar.advance(1)

        make_parts(recipe, files, work, processes, tick)
    parts = complete_parts(work)
    tally = Tally()
    for part in parts:
        tally.add(part.tally())
    kept = _drop(recipe, parts, tally)
    shards = _write_shards(parts, kept, out, processes, tally)
    report = make_report(recipe, parts, kept, tally, shards, time.monotonic() - began, __version__)
    samples = [entry for entries in tally.samples.values() for entry in entries]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in samples)
    write_atomic(out / SAMPLES, lines.encode("utf-8", "replace"))
    shutil.copyfile(work / PLAN, out / PLAN)
    write_report(report, out)
    shutil.rmtree(work)
    return Outcome(report, report["problems"])


# ---- duplicates ----


def _drop(recipe: Recipe, parts: list[Part], tally: Tally) -> np.ndarray:
    """Whether each document is kept: bool ``[documents]``. ``tally`` takes in those that are not."""
    total = sum(part.documents for part in parts)
    kept = np.ones(total, bool)
    starts = np.cumsum([0, *(part.documents for part in parts)])
    labels = [source.label for source in recipe.sources]

    def drop(name: str, numbers: np.ndarray, reason: str) -> None:
        kept[numbers] = False
        for part, first in zip(parts, starts, strict=False):
            rows = part.rows()[numbers[(numbers >= first) & (numbers < first + part.documents)] - first]
            for index in np.unique(rows["source"]):
                mine = rows["characters"][rows["source"] == index]
                tally.source(labels[index]).drop(name, reason, (len(mine), int(mine.sum(dtype=np.int64))))
        wanted = dict.fromkeys(numbers[:FEW].tolist())
        tally.add_samples(f"{name}: {reason}", _excerpts(parts, starts, wanted, name, reason))

    if recipe.exact_duplicates and total:
        keys = np.concatenate([part.rows()["key"] for part in parts])
        repeated = exact_duplicates(keys)
        del keys
        if (numbers := np.flatnonzero(repeated >= 0)).size:
            drop("exact_duplicates", numbers, "the same text as a document before")
    if recipe.near_duplicates.enabled and total:
        with progress("near duplicates", 0) as bar:
            bar.advance()
            repeated = near_duplicates([part.signatures for part in parts], recipe.near_duplicates, kept)
        if (numbers := np.flatnonzero((repeated >= 0) & kept)).size:
            drop("near_duplicates", numbers, "nearly the text of a document before")
    if recipe.decontamination.files and total:
        found = np.concatenate([part.rows()["contaminated"] for part in parts])
        for n, file in enumerate(recipe.decontamination.files, start=1):
            if (numbers := np.flatnonzero((found == n) & kept)).size:
                drop("decontamination", numbers, f"has text of {Path(file).name}")
    return kept


def _excerpts(
    parts: list[Part], starts: np.ndarray, wanted: dict[int, None], fate: str, reason: str = ""
) -> Iterator[dict[str, Any]]:
    """Samples of the documents of these numbers."""
    for part, first in zip(parts, starts, strict=False):
        mine = {n - int(first) for n in wanted if first <= n < first + part.documents}
        if not mine:
            continue
        last = max(mine)
        for n, line in enumerate(read_lines(part.lines)):
            if n in mine:
                values = json.loads(line)
                known = ("text", "source", "kind", "id")
                document = Document(**{key: values.pop(key) for key in known}, metadata=values)
                yield sample(document, fate, reason)
            if n == last:
                break


# ---- shards ----


def _write_shards(parts: list[Part], kept: np.ndarray, out: Path, processes: int, tally: Tally) -> list[dict[str, Any]]:
    """A shard of each part that has documents left."""
    starts = np.cumsum([0, *(part.documents for part in parts)])
    masks = [kept[first : first + part.documents] for part, first in zip(parts, starts, strict=False)]
    filled = [(part, mask) for part, mask in zip(parts, masks, strict=True) if mask.any()]
    with ThreadPoolExecutor(processes) as pool, progress("shards", len(filled)) as bar:  # zstd works without the GIL
        jobs = [
            pool.submit(_write_shard, part, mask, out / f"{n:05}.jsonl.zst") for n, (part, mask) in enumerate(filled)
        ]
        shards = []
        for job in jobs:
            shards.append(job.result())
            bar.advance(1)
    numbers = np.flatnonzero(kept)
    few = numbers[:: max(1, len(numbers) // (2 * FEW))][: 2 * FEW]
    tally.samples["kept"] = list(_excerpts(parts, starts, dict.fromkeys(few.tolist()), "kept"))
    return shards


def _write_shard(part: Part, mask: np.ndarray, path: Path) -> dict[str, Any]:
    characters = int(part.rows()["characters"][mask].sum(dtype=np.int64))
    with atomic(path) as temporary:
        if mask.all():
            shutil.copyfile(part.lines, temporary)
        else:
            with open(temporary, "wb") as file, zstandard.ZstdCompressor(LEVEL).stream_writer(file) as writer:
                for keep, line in zip(mask, read_lines(part.lines), strict=True):
                    if keep:
                        writer.write(line + b"\n")
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
    return {
        "name": path.name,
        "documents": int(mask.sum()),
        "characters": characters,
        "bytes": size,
        "sha256": digest,
    }
