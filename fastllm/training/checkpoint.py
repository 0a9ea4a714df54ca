"""Checkpoints that training goes on from: torch.distributed.checkpoint, in safetensors, written in the background.

A checkpoint is a folder ``step-00000200``: a safetensors file from each process, with its shards and where they lie in
the whole, and ``checkpoint.json`` with the rest of the state, the size and the SHA-256 of every file. It gets its name
when all of it is on disk, so that a folder of that name is whole, whenever the processes were killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import Future as Background
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


class Checkpoints:
    """The checkpoints in a folder, of all processes of the default group, which call each method together."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.begun: set[int] = set()  # steps whose checkpoints are written or being written
        self.saving: tuple[int, Background] | None = None
        self.group = dist.new_group(backend="gloo")  # of the thread that writes
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for rest in folder.glob(".*"):  # of a process that was killed
                shutil.rmtree(rest)
        dist.barrier(self.group)

    def steps(self) -> list[int]:
        """The steps of the whole ones, in order."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _part(self, step: int) -> Path:
        """What it is called while it is written."""
        return self.folder / f".{self.path(step).name}"

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> str | None:
        """Begin to write ``tensors`` (DTensors, each process its shards) and ``facts`` (what JSON can hold).

        Returns when both are copied; first the one before it is waited for: what :meth:`wait` said of it is returned.
        """
        before = self.wait()
        part = self._part(step)
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        writer = _Writer(part, self.path(step), {"step": step, "processes": dist.get_world_size(), **facts}, self.keep)
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        self.saving = step, future
        self.begun.add(step)
        return before

    def wait(self) -> str | None:
        """Wait until nothing is being written. What went wrong with it, on whichever process."""
        if self.saving is None:
            return None
        (step, future), self.saving = self.saving, None
        try:
            future.result()
        except (Exception, dcp.CheckpointException) as error:
            self.begun.discard(step)
            if dist.get_rank() == 0:
                shutil.rmtree(self._part(step), ignore_errors=True)  # the disk may be full
            return f"the checkpoint of step {step} was not saved: {_reason(error)}"
        return None

    def load(self, step: int, tensors: dict[str, Tensor]) -> str | None:
        """Read the checkpoint of ``step`` into ``tensors``, in place. What is wrong with it, if it is damaged."""
        files = sorted(self.facts(step)["files"].items())
        mine = files[dist.get_rank() :: dist.get_world_size()]
        damaged = [name for name, entry in mine if not _is_whole(self.path(step) / name, entry)]
        found: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, damaged, self.group)
        names = [name for of_process in found for name in of_process]
        if names:
            return f"{self.path(step)} is damaged: {', '.join(names)} is not what was written"
        reader = HuggingFaceStorageReader(str(self.path(step)))
        dcp.load(tensors, storage_reader=reader, process_group=self.group)
        return None

    def facts(self, step: int) -> dict[str, Any]:
        """What was saved beside the tensors; ``step``, ``processes`` and ``files`` too."""
        path = self.path(step) / MANIFEST
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"can't read {path}: {error}") from None


class _Writer(HuggingFaceStorageWriter):
    """Writes into ``part``; the first process gives it the name ``target`` when all have written."""

    def __init__(self, part: Path, target: Path, facts: dict[str, Any], keep: int) -> None:
        super().__init__(str(part), save_distributed=True)
        self.part, self.target, self.facts, self.keep = part, target, facts, keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        written = super().write_data(plan, planner)
        written.wait()
        names = {result.storage_data.relative_path for result in written.value()}
        checked: Future[Any] = Future()
        checked.set_result([(name, _entry(self.part / name)) for name in sorted(names)])
        return checked

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        files = dict(entry for of_process in results for entry in of_process)
        write_atomic(self.part / MANIFEST, json.dumps({**self.facts, "files": files}, indent=1).encode())
        to_disk(self.part)
        if self.target.exists():  # a step that was trained again
            _remove(self.target)
        os.replace(self.part, self.target)
        to_disk(self.target.parent)
        whole = sorted(path for path in self.target.parent.iterdir() if _NAME.fullmatch(path.name))
        for old in whole[: -self.keep]:
            _remove(old)


def _remove(folder: Path) -> None:
    """It loses its name first: what is half deleted is no checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return _entry(path) == entry
    except OSError:
        return False


def _reason(error: BaseException) -> str:
    """The first failure of a process, in a line."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items())[0]
        return f"{_reason(cause)} (process {rank})"
    return str(error).partition("\n")[0] or type(error).__name__


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random generators, as tensors under names of its own."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"random.{name}.{dist.get_rank()}": state for name, state in states.items()}


def set_random_state(device: torch.device, states: dict[str, Tensor]) -> None:
    """What :func:`random_state` gave."""
    torch.set_rng_state(states[f"random.cpu.{dist.get_rank()}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"random.cuda.{dist.get_rank()}"], device)
