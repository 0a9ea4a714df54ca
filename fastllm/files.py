"""Atomic writes: a file is complete or not there. And a standard output that can't be written to."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path to write to. At the end of the block the file is flushed to disk and renamed to ``path``."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # /dev/null would be replaced by a file
        raise UserError(f"can't write {path}: it is a pipe or a device, not a file")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; some libraries make files that only their owner reads
        yield part
        part.chmod(mode)
        to_disk(part)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's names, to disk: they survive a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path: str | Path, content: bytes) -> None:
    with atomic(path) as part:
        part.write_bytes(content)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write files into. At the end it is renamed to ``path``, which is new or an empty folder."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        mode = part.stat().st_mode & 0o666
        for file in part.iterdir():
            file.chmod(mode)
            to_disk(file)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def silence_stdout() -> None:
    """Send the standard output nowhere, what it still holds included: at its end Python writes that again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # no file of the system, as in a notebook
        sys.stdout = None
