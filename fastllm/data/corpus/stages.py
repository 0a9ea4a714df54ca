"""The stages of a preparation. Each call is a task, which reads files and writes files that are complete or not there.

    1. clean        for each task: its share of the files becomes parts: documents, keys, MinHash signatures
    2. buckets      for each band: which documents agree in it        (not without near duplicates)
    3. decide       one task: which documents are kept
    4. shards       for each task: its share of the parts without the documents that are dropped
    5. finish       one task: the report, which completes the corpus

A task that is done is not done again, so each can be restarted. Stages 1, 2 and 4 have tasks that may run at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from ... import __version__
from ...files import atomic, write_atomic
from ...input_files import read_json
from ..deduplication import Signatures, exact_duplicates, read_clusters, write_buckets, write_clusters
from ..document import Document
from .parts import Files, Part, complete_parts, make_parts
from .recipe import Recipe
from .report import make_report, write_report
from .shards import SAMPLES, read_lines
from .tally import SAMPLES as FEW
from .tally import Tally, sample
from .worker import LEVEL

PLAN = "plan.json"


@dataclass(frozen=True)
class Preparation:
    """A recipe, its files, and the folder that the corpus comes into.

    ``tasks``: how many the files are shared among, each with consecutive ones.
    """

    recipe: Recipe
    files: Files
    out: Path
    tasks: int = 1

    @property
    def work(self) -> Path:
        return self.out / "work"

    def _folder(self, task: int) -> Path:
        return self.work / f"task-{task:05}"

    def parts(self) -> list[Part]:
        """All parts, in the order of the documents."""
        return [part for task in range(self.tasks) for part in complete_parts(self._folder(task))]

    def clean(self, task: int = 0, processes: int = 1, tick: Callable[[int, int], None] | None = None) -> None:
        """Stage 1. ``tick(documents, bytes)`` is called for each batch that is done."""
        folder = self._folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        first, last = (len(self.files) * n // self.tasks for n in (task, task + 1))
        make_parts(self.recipe, self.files[first:last], folder, processes, tick or (lambda documents, size: None))

    @property
    def bands(self) -> int:
        """The tasks of stage 2: each band, and the whole signature."""
        near = self.recipe.near_duplicates
        return near.bands + 1 if near.enabled else 0

    def _bucket_file(self, band: int) -> Path:
        return self.work / f"buckets-{band:04}"

    def buckets(self, band: int) -> None:
        """Stage 2."""
        paths = [part.signatures for part in self.parts() if part.documents]
        if paths and not self._bucket_file(band).exists():
            write_buckets(Signatures(paths), band, self._bucket_file(band))

    # ---- stage 3 ----

    def decide(self) -> None:
        """Write which documents are kept, and what is said of the others."""
        if (self.work / "dropped.json").exists():
            return
        recipe, parts, tally = self.recipe, self.parts(), Tally()
        kept = np.ones(sum(part.documents for part in parts), bool)
        if recipe.exact_duplicates and kept.size:
            repeated = exact_duplicates([part.rows()["key"] for part in parts if part.documents]) >= 0
            self._drop(parts, kept, repeated, tally, "exact_duplicates", "the text of a document before")
            del repeated
        if recipe.near_duplicates.enabled and kept.size:
            clusters = self.work / "clusters"
            if not clusters.exists():
                signatures = Signatures([part.signatures for part in parts if part.documents])
                write_clusters(signatures, [self._bucket_file(band) for band in range(self.bands)], clusters)
            repeated = read_clusters(clusters) >= 0
            self._drop(parts, kept, repeated, tally, "near_duplicates", "nearly the text of a document before")
            del repeated
        if recipe.decontaminates and kept.size:
            found = np.concatenate([part.rows()["contaminated"] for part in parts])
            for n, file in enumerate(recipe.decontamination.files, start=1):
                self._drop(parts, kept, found == n, tally, "decontamination", f"text of {Path(file).name}")
        few = np.flatnonzero(kept)
        few = few[:: max(1, len(few) // (2 * FEW))][: 2 * FEW]
        tally.samples["kept"] = list(_excerpts(parts, few, "kept"))
        with atomic(self.work / "kept.npy") as path, open(path, "wb") as output:
            np.save(output, kept, allow_pickle=False)
        write_atomic(self.work / "dropped.json", json.dumps(tally.to_json()).encode())

    def _drop(
        self, parts: list[Part], kept: np.ndarray, dropped: np.ndarray, tally: Tally, name: str, reason: str
    ) -> None:
        first = 0
        for part in parts:
            here = slice(first, first + part.documents)
            rows = part.rows()[dropped[here] & kept[here]]
            first += part.documents
            for index in np.unique(rows["source"]):
                mine = rows["characters"][rows["source"] == index]
                label = self.recipe.sources[index].label
                tally.source(label).drop(name, reason, (len(mine), int(mine.sum(dtype=np.int64))))
        few = np.flatnonzero(dropped & kept)[:FEW]
        if few.size:
            tally.samples[f"{name}: {reason}"] = list(_excerpts(parts, few, name, reason))
        kept[dropped] = False

    # ---- stages 4 and 5 ----

    def _shares(self) -> list[tuple[Part, np.ndarray]]:
        """The parts that have documents left, and which: the shards, by their numbers."""
        kept, first, shares = np.load(self.work / "kept.npy", mmap_mode="r", allow_pickle=False), 0, []
        for part in self.parts():
            mask = kept[first : first + part.documents]
            first += part.documents
            if mask.any():
                shares.append((part, mask))
        return shares

    def shards(self, task: int = 0, tasks: int = 1, tick: Callable[[int], None] | None = None) -> None:
        """Stage 4. ``tick(1)`` is called for each shard that is done."""
        for number, (part, mask) in enumerate(self._shares()):
            about = self.work / f"shard-{number:05}.json"
            if number % tasks == task and not about.exists():
                values = _write_shard(part, mask, self.out / f"{number:05}.jsonl.zst")
                write_atomic(about, json.dumps(values).encode())
            if tick is not None:
                tick(1)

    def finish(self, seconds: float = 0.0) -> dict[str, Any]:
        """Stage 5; returns the report. ``seconds``: that the preparation took."""
        parts, tally = self.parts(), Tally()
        for part in parts:
            tally.add(part.tally())
        tally.add(Tally.from_json(read_json(self.work / "dropped.json", limit=2**28)))
        kept = np.load(self.work / "kept.npy", mmap_mode="r", allow_pickle=False)
        shards = [read_json(self.work / f"shard-{number:05}.json") for number in range(len(self._shares()))]
        report = make_report(self.recipe, parts, kept, tally, shards, seconds, __version__)
        samples = [entry for entries in tally.samples.values() for entry in entries]
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in samples)
        write_atomic(self.out / SAMPLES, lines.encode("utf-8", "replace"))
        write_report(report, self.out)
        shutil.rmtree(self.work)
        return report


def _excerpts(parts: list[Part], numbers: np.ndarray, fate: str, reason: str = "") -> Iterator[dict[str, Any]]:
    """Samples of the documents of these numbers, which ascend."""
    first = 0
    for part in parts:
        mine = set((numbers[(numbers >= first) & (numbers < first + part.documents)] - first).tolist())
        first += part.documents
        for n, line in enumerate(read_lines(part.lines) if mine else ()):
            if n in mine:
                values = json.loads(line)
                known = {key: values.pop(key) for key in ("text", "source", "kind", "id")}
                yield sample(Document(**known, metadata=values), fate, reason)
            if n == max(mine):
                break


def _write_shard(part: Part, mask: np.ndarray, path: Path) -> dict[str, Any]:
    characters = int(part.rows()["characters"][mask].sum(dtype=np.int64))
    with atomic(path) as temporary:
        if mask.all():
            shutil.copyfile(part.lines, temporary)
        else:
            with open(temporary, "wb") as output, zstandard.ZstdCompressor(LEVEL).stream_writer(output) as writer:
                for keep, line in zip(mask, read_lines(part.lines), strict=True):
                    if keep:
                        writer.write(line + b"\n")
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
    documents = int(mask.sum())
    return {"name": path.name, "documents": documents, "characters": characters, "bytes": size, "sha256": digest}
