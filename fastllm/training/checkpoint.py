"""Checkpoints: torch.distributed.checkpoint, in safetensors, written in the background.

A checkpoint is a folder ``step-00000200``: a safetensors file of each rank, with its shards and their place in the full
tensors, and ``checkpoint.json``, the manifest: the rest of the state, the size and SHA-256 of every file, and a SHA-256
of its own. The folder gets its name when all of it is on disk. So a folder of that name is complete, whenever the ranks
were killed. What is read is what the manifest lists, and all of it is verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
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

from ..distributed.mesh import run_on_rank0
from ..errors import UserError
from ..files import to_disk, write_atomic
from ..input_files import open_regular, read_json

MANIFEST = "checkpoint.json"
CHECKSUM = "sha256"  # the manifest's key of the SHA-256 of all its other keys
MAX_MANIFEST_BYTES = 64 * 2**20
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})(\.\w+)*")  # what a killed process was writing or deleting
_ASIDE = ".aside"  # ends the name of a checkpoint that is about to be replaced


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was written; the message says what is wrong with it."""


class Checkpointer:
    """The checkpoints in ``folder``. All ranks of the default group call each method together, except ``steps``.

    No other process may write to the folder (the run folder's lock sees to it).

    Args:
        folder: is made if it is not there.
        keep: this many latest checkpoints; older ones are deleted, once the new one has its name.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.begun: set[int] = set()  # steps whose checkpoints are written or being written
        self._pending: tuple[int, BackgroundFuture] | None = None
        self._group = dist.new_group(backend="gloo")  # of the thread that writes
        run_on_rank0(lambda: _tidy(folder))
        self._token = run_on_rank0(lambda: secrets.token_hex(4))  # a rank that outlives its run has another

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return sorted(_complete(self.folder))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _unfinished_path(self, step: int) -> Path:
        """Its name while it is written."""
        return self.folder / f".{self.path(step).name}.{self._token}"

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

    def manifest(self, step: int) -> dict[str, Any]:
        """What was saved beside the tensors, with ``step``, ``world_size`` and ``files``.

        Raises DamagedCheckpoint, on all ranks, where it can't be read or is not what was written.
        """
        read: list[Any] = [None, None]  # the manifest, or what is wrong: rank 0 reads for all
        if dist.get_rank() == 0:
            try:
                read[0] = _read_manifest(self.path(step))
            except DamagedCheckpoint as error:
                read[1] = str(error)
        dist.broadcast_object_list(read, group=self._group)
        if read[1] is not None:
            raise DamagedCheckpoint(read[1])
        return read[0]

    def load(self, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Read a checkpoint into ``tensors``, in place.

        Raises DamagedCheckpoint, on all ranks, where a file is not what was written or a tensor is not in them; then
        ``tensors`` may hold anything.
        """
        folder, files = self.path(manifest["step"]), sorted(manifest["files"].items())
        mine = files[dist.get_rank() :: dist.get_world_size()]
        damaged = [name for name, entry in mine if not _is_intact(folder / name, entry)]
        by_rank: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(by_rank, damaged, self._group)
        names = [name for of_rank in by_rank for name in of_rank]
        if names:
            raise DamagedCheckpoint(f"{folder} is damaged: {', '.join(names)} is not what was written")
        try:
            dcp.load(tensors, storage_reader=_Reader(folder, manifest), process_group=self._group)
        except dcp.CheckpointException as error:
            raise DamagedCheckpoint(f"{folder} is damaged: {_reason(error)}") from None


class _Reader(HuggingFaceStorageReader):
    """Reads the files that the manifest lists, and no others that are in the folder."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(str(folder))
        paths = [str(folder / name) for name in sorted(manifest["files"])]
        self.fs.ls = lambda path: paths  # type: ignore[method-assign]


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
        manifest = {**self.metadata, "files": dict(entry for of_rank in results for entry in of_rank)}
        manifest[CHECKSUM] = _checksum(manifest)
        write_atomic(self.unfinished / MANIFEST, json.dumps(manifest, indent=1).encode())
        to_disk(self.unfinished)
        aside = self.target.with_name(f".{self.target.name}{_ASIDE}")
        if os.path.lexists(self.target):  # a step that was trained twice
            os.replace(self.target, aside)
        os.replace(self.unfinished, self.target)
        to_disk(self.target.parent)
        _delete(aside)
        _rotate(self.target, self.keep)


# ---- the folder ----


def _complete(folder: Path) -> dict[int, Path]:
    """The complete checkpoints (folders, or links to some) by their step."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match and path.is_dir()}


def _tidy(folder: Path) -> None:
    """Make the folder; delete what a killed process left. A checkpoint set aside to be replaced gets its name back."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in list(folder.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match and path.name.endswith(_ASIDE) and not os.path.lexists(folder / match[1]):
                os.replace(path, folder / match[1])
            elif match:
                _delete(path)
    except OSError as error:
        raise UserError(f"can't use {folder}: {error.strerror}") from None


def _rotate(latest: Path, keep: int) -> None:
    """Keep ``keep`` checkpoints: the one just written, and the latest before it that have their files.

    Those of later steps were passed over as damaged when the run was resumed.
    """
    complete = sorted(_complete(latest.parent).items(), reverse=True)
    before = [path for _, path in complete if path.name < latest.name and _has_its_files(path)]
    kept = {latest, *before[: keep - 1]}
    for _, path in complete:
        if path not in kept:
            doomed = path.with_name(f".{path.name}.old")  # renamed first: a half-deleted folder is no checkpoint
            _delete(doomed)
            os.replace(path, doomed)
            _delete(doomed)


def _delete(path: Path) -> None:
    """A folder with all that is in it, or a link and not what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


# ---- the manifest ----


def _checksum(manifest: dict[str, Any]) -> str:
    """Of all but the checksum itself, however the file is laid out."""
    content = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The verified manifest; DamagedCheckpoint where it is not what was written."""
    try:
        manifest = read_json(folder / MANIFEST, MAX_MANIFEST_BYTES)
    except UserError as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {error}") from None
    if manifest.get(CHECKSUM) != _checksum(manifest):
        raise DamagedCheckpoint(f"{folder} is damaged: {MANIFEST} is not what was written")
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not files or not all(_is_entry(*item) for item in files.items()):
        raise DamagedCheckpoint(f"{folder} is damaged: {MANIFEST} lists no files of this folder")
    if not isinstance(step, int) or folder.name != f"step-{step:08d}":
        raise DamagedCheckpoint(f"{folder} is damaged: it is the checkpoint of step {step}")
    return manifest


def _is_entry(name: str, entry: Any) -> bool:
    return Path(name).name == name and isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}


def _has_its_files(folder: Path) -> bool:
    """Whether the manifest is whole and every file has its size: a look, without reading them."""
    try:
        files = _read_manifest(folder)["files"].items()
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files)
    except (DamagedCheckpoint, OSError):
        return False


def _entry(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_intact(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return path.stat().st_size == entry["bytes"] and _entry(path) == entry
    except (OSError, UserError):
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
