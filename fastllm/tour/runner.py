"""Running the stages in their order: what is done stays done, and tour.json says what that is."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import console
from ..errors import UserError
from ..files import write_atomic
from ..input_files import read_json
from .stages import Stage

STATE, LOGS = "tour.json", "logs"
TAIL = 20  # lines of the log that are shown where a command fails
POLL = 0.2  # seconds between looks at a command that runs
PATIENCE = 30.0  # seconds that an interrupted command has to end by itself


@dataclass
class State:
    """Which tour a folder holds, and the seconds of each finished stage."""

    version: str
    seed: int
    quick: bool
    seconds: dict[str, float] = field(default_factory=dict)


def open_state(folder: Path, wanted: State) -> State:
    """The state of the tour in ``folder``, which is made where it is not there.

    Raises:
        UserError: the folder holds something else, or the tour of another version, seed or size.
    """
    path = folder / STATE
    if path.exists():
        found = read_json(path)
        if found.keys() != asdict(wanted).keys() or not isinstance(found["seconds"], dict):
            raise UserError(f"{path} is damaged; choose another folder with --out")
        state = State(**found)
        for name in ("version", "seed", "quick"):
            if getattr(state, name) != getattr(wanted, name):
                raise UserError(
                    f"{folder} holds a tour of {name} {getattr(state, name)}, not {getattr(wanted, name)}; "
                    "choose another folder with --out"
                )
        return state
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no tour; choose another folder with --out")
    except OSError as error:
        raise UserError(f"can't use the folder {folder}: {error.strerror}") from None
    save_state(folder, wanted)
    return wanted


def save_state(folder: Path, state: State) -> None:
    write_atomic(folder / STATE, (json.dumps(asdict(state), indent=2) + "\n").encode())


def run_stages(folder: Path, state: State, todo: Sequence[Stage]) -> None:
    """Run the stages that are not finished.

    Raises:
        UserError: a command failed; the end of its log has been shown.
    """
    (folder / LOGS).mkdir(exist_ok=True)
    (folder / "results").mkdir(exist_ok=True)
    for number, stage in enumerate(todo, 1):
        console.say(f"{number}/{len(todo)}", f"{stage.about}")
        if stage.command:
            console.say("", "$ " + shown(stage.command))
        if stage.name in state.seconds:
            console.say("", f"done before, in {state.seconds[stage.name]:.0f} s")
            continue
        _remove(folder / name for name in stage.makes)
        began = time.monotonic()
        if stage.write is not None:
            with console.working(stage.name):
                stage.write(folder)
        if stage.command:
            _run(folder, stage)
        state.seconds[stage.name] = round(time.monotonic() - began, 1)
        save_state(folder, state)
        console.say("", f"{state.seconds[stage.name]:.0f} s: {', '.join(stage.makes)}")


def shown(command: Sequence[str]) -> str:
    """The command as one types it in the tour's folder."""
    return shlex.join(("fastllm", *command))


def _remove(paths: Iterable[Path]) -> None:
    """What an interrupted run of the stage left: the commands refuse to write over it."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _run(folder: Path, stage: Stage) -> None:
    """Run the command of a stage, its output in a log, with a spinner that shows the last line of it."""
    log = folder / LOGS / f"{stage.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            (sys.executable, "-m", "fastllm", *stage.command), cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        _watch(process, stage.name, log)
    except BaseException:  # Ctrl-C, which the command gets too
        try:
            process.wait(PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        console.say("stopped", f"in the stage {stage.name}: the same command continues with it")
        raise
    if process.returncode:
        for line in last_lines(log, TAIL):
            console.say("", line)
        raise UserError(f"fastllm {' '.join(stage.command[:2])} failed with exit code {process.returncode}: see {log}")


def _watch(process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    """Wait for the process to end."""
    began = time.monotonic()
    terminal = console.console.is_terminal
    with console.console.status(name) if terminal else nullcontext() as status:
        while process.poll() is None:
            time.sleep(POLL)
            if status is not None:
                line = "".join(last_lines(log, 1))[:80]
                status.update(f"{name}, {time.monotonic() - began:.0f} s  {line}")


def last_lines(log: Path, n: int) -> list[str]:
    """The last lines of a log that are not blank."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 100 * (n + 10)))
        lines = file.read().decode(errors="replace").splitlines()
    return [console.visible(line) for line in lines if line.strip()][-n:]
