"""Checkpoints: torch.distributed.checkpoint, in safetensors, written in the background.

A checkpoint is a folder ``step-00000200``: a safetensors file of each rank, with its shards and their place in the full
tensors, and ``checkpoint.json`` with the rest of the state, and the size and SHA-256 of every file. The folder gets its
name when all of it is on disk. So a folder of that name is complete, whenever the ranks were killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import Future as BackgroundFuture
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from ..errors import UserError
from ..files import to_disk, write_atomic

MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpointer:
    """The checkpoints in ``folder``. All ranks of the default group call each method together.

    Args:
        folder: is made if it is not there.
        keep: this many latest checkpoints; older ones are deleted.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.begun: set[int] = set()  # steps whose checkpoints are written or being written
        self._pending: tuple[int, BackgroundFuture] | None = None
        self._group = dist.new_group(backend="gloo")  # of the thread that writes
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*"):  # of a process that was killed
                shutil.rmtree(leftover)
        dist.barrier(self._group)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _unfinished_path(self, step: int) -> Path:
        """Its name while it is written."""
        return self.folder / f".{self.path(step).name}"

    def save(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str | None:
        """Begin to write ``tensors`` (of DTensors, each rank its shards) and ``metadata`` (values that JSON can hold).

        Waits for the checkpoint before, and returns what :meth:`wait` returns of it. Then it returns as soon as both
        are copied.
        """
        problem = self.wait()
        unfinished = self._unfinished_path(step)
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        metadata = {"step": step, "world_size": dist.get_world_size(), **metadata}
        writer = _Writer(unfinished, self.path(step), metadata, self.keep)
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(future, BackgroundFuture)
        self._pending = step, future
        self.begun.add(step)
        return problem

    def wait(self) -> str | None:
        """Wait until nothing is being written. Returns what went wrong on any rank, or None."""
        if self._pending is None:
            return None
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except (Exception, dcp.CheckpointException) as error:
            self.begun.discard(step)
            if dist.get_rank() == 0:
                shutil.rmtree(self._unfinished_path(step), ignore_errors=True)  # the disk may be full
            return f"the checkpoint of step {step} was not saved: {_reason(error)}"
        return None

    def load(self, step: int, tensors: dict[str, Tensor]) -> str | None:
        """Read the checkpoint of ``step`` into ``tensors``, in place. Returns what is damaged, or None."""
        files = sorted(self.metadata(step)["files"].items())
        mine = files[dist.get_rank() :: dist.get_world_size()]
        damaged = [name for name, entry in mine if not _is_intact(self.path(step) / name, entry)]
        by_rank: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(by_rank, damaged, self._group)
        names = [name for of_rank in by_rank for name in of_rank]
        if names:
            return f"{self.path(step)} is damaged: {', '.join(names)} is not what was written"
        reader = HuggingFaceStorageReader(str(self.path(step)))
        dcp.load(tensors, storage_reader=reader, process_group=self._group)
        return None

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the tensors, with ``step``, ``world_size`` and ``files``."""
        path = self.path(step) / MANIFEST
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"can't read {path}: {error}") from None


class _Writer(HuggingFaceStorageWriter):
    """Writes into ``unfinished``; rank 0 renames it to ``target`` when all ranks have written."""

    def __init__(self, unfinished: Path, target: Path, metadata: dict[str, Any], keep: int) -> None:
        super().__init__(str(unfinished), save_distributed=True)
        self.unfinished, self.target, self.metadata, self.keep = unfinished, target, metadata, keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        written = super().write_data(plan, planner)
        written.wait()
        names = {result.storage_data.relative_path for result in written.value()}
        hashed: Future[Any] = Future()
        hashed.set_result([(name, _entry(self.unfinished / name)) for name in sorted(names)])
        return hashed

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        files = dict(entry for of_rank in results for entry in of_rank)
        write_atomic(self.unfinished / MANIFEST, json.dumps({**self.metadata, "files": files}, indent=1).encode())
        to_disk(self.unfinished)
        if self.target.exists():  # a step that was trained twice
            _remove(self.target)
        os.replace(self.unfinished, self.target)
        to_disk(self.target.parent)
        complete = sorted(path for path in self.target.parent.iterdir() if _NAME.fullmatch(path.name))
        for old in complete[: -self.keep]:
            _remove(old)


def _remove(folder: Path) -> None:
    """Rename it first, so that a half-deleted folder is no checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_intact(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return _entry(path) == entry
    except OSError:
        return False


def _reason(error: BaseException) -> str:
    """The first failure of a rank, in a line."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items())[0]
        return f"{_reason(cause)} (rank {rank})"
    return str(error).partition("\n")[0] or type(error).__name__


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of this rank's random generators, as tensors whose names hold the rank."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"rng.{name}.{dist.get_rank()}": state for name, state in states.items()}


def set_rng_state(device: torch.device, states: dict[str, Tensor]) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(states[f"rng.cpu.{dist.get_rank()}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"rng.cuda.{dist.get_rank()}"], device)
