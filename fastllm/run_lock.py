"""One folder, one writer: the lock of a run folder or a corpus."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from . import console
from .errors import UserError

LOCK = "run.lock"  # in a run folder: who trains it (JSON), held by flock
TOUCH_EVERY = 30.0  # seconds between signs of life, for other hosts
STALE_AFTER = 150.0  # seconds without one


@contextmanager
def run_lock(folder: Path, work: str = "training") -> Iterator[None]:
    """Hold the lock of a folder, which must exist, in the block. ``work``: what it is held for, for messages.

    The operating system frees it when the process ends, however it ends; then the file that stays behind is stale, and
    the next holder says so. Where hosts share the folder and not their locks, the file's time tells whether its writer
    is alive.

    Raises:
        UserError: another process holds the lock, or the folder can't be written to.
    """
    path = folder / LOCK
    number = _acquire(path, work)
    stopped = threading.Event()
    toucher = threading.Thread(target=_touch, args=(number, stopped), daemon=True)
    try:
        own = {"pid": os.getpid(), "host": socket.gethostname(), "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps(own).encode() + b"\n", 0)
        toucher.start()
        yield
    finally:
        stopped.set()
        if toucher.ident is not None:
            toucher.join()
        if _is_at(number, path):
            path.unlink(missing_ok=True)
        os.close(number)


def _acquire(path: Path, work: str) -> int:
    """The descriptor of the locked file."""
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"can't write to {path.parent}: {path.name}: {error.strerror}") from None
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, known = False, True
        except BlockingIOError:
            held, known = True, True
        except OSError:  # a file system without locks
            held, known = False, False
        if not held and not _is_at(number, path):  # its holder has just removed it
            os.close(number)
            continue
        owner = _read(number)
        if held or (owner and _is_alive(owner, number, known)):
            os.close(number)
            gone = "" if held else f"; where it is gone, delete {path}"
            advice = f"wait for it, or stop it (what it has done stays){gone}"
            raise UserError(f"{path.parent} is in {work} by {_name(owner)}: {advice}")
        if owner:
            console.say("note", f"the last {work} of {path.parent}, by {_name(owner)}, ended without a word")
        return number


def _is_alive(owner: dict[str, Any], number: int, locks_known: bool) -> bool:
    """Whether the process in the file lives, although no lock of it is seen."""
    if owner.get("host") != socket.gethostname():
        return time.time() - os.fstat(number).st_mtime < STALE_AFTER
    if locks_known:
        return False
    try:
        os.kill(owner["pid"], 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _is_at(number: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except OSError:
        return False


def _read(number: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(number, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and isinstance(owner.get("host"), str)
    return owner if whole else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:  # it has just locked the file
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('started')})"


def _touch(number: int, stopped: threading.Event) -> None:
    while not stopped.wait(TOUCH_EVERY):
        try:
            os.utime(number)
        except OSError:
            return
