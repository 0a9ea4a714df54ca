"""The tour: all stages, and the report."""

from __future__ import annotations

import shlex
from pathlib import Path

from .. import __version__, console
from ..errors import require_packages
from ..run_lock import run_lock
from .report import PICTURE, REPORT, write_report
from .runner import State, open_state, run_stages
from .sizes import FULL, QUICK
from .stages import ALIGNED, stages


def tour(out: Path, *, quick: bool, seed: int) -> int:
    """Build a language model in the folder ``out``, from raw sources to an aligned chatbot, and report on it.

    A tour that ended early continues after its last finished stage. The same seed makes the same world and, on the same
    machine, the same models.

    Args:
        out: a new or empty folder, or that of a tour of the same seed and size.
        quick: a smaller world and model, for a look at the machinery.

    Raises:
        UserError: the folder holds something else, a package is missing, or a command failed.
    """
    _require()
    state = open_state(out, State(__version__, seed, quick))
    with run_lock(out, "a tour"):
        todo = stages(QUICK if quick else FULL, seed)
        where = shlex.quote(str(out))
        console.say("tour", f"{len(todo)} stages in {out}; each command can be run again there: cd {where}")
        run_stages(out, state, todo)
        measures = write_report(out, state, todo)
    minutes = sum(state.seconds.values()) / 60
    console.say("done", f"in {minutes:.1f} minutes: {out / REPORT}, {out / PICTURE}")
    for measure in measures:
        goal = "" if quick else f"  (goal {measure.wanted}{'' if measure.reached else ', MISSED'})"
        console.say("", f"{measure.about}: {measure.first.value:.0%} before, {measure.last} after{goal}")
    console.say("try", f"fastllm serve {where}/{ALIGNED}")
    return 0


def _require() -> None:
    from ..errors import pip_install

    require_packages("fastllm tour", "fastwarc", "resiliparse", "mwxml", "mwparserfromhell", "py3langid", "rensa")
    require_packages("fastllm tour", "jinja2", "peft", install=pip_install("tune"))
