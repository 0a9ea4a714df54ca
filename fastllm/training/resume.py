"""Where a resumed run goes on from: its last intact checkpoint or, where asked, its weights."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from .. import config as configs
from .. import console, run_dir
from ..config import Config
from ..distributed.mesh import abort_all_ranks, run_on_rank0
from ..errors import UserError
from .final_weights import load_final, read_record
from .trainer import Trainer

KEPT = ("optim.optimizer", "spikes.window", "train.seed")  # settings that a resumed run continues with


def check_continues(config: Config, before: Config) -> None:
    """Raise UserError where ``config`` does not continue the run that ``before`` began."""
    if config.model != before.model or config.data != before.data:
        raise UserError("--resume continues with the model and the data of the run: leave out --model and --data")
    for name in KEPT:
        if attrgetter(name)(config) != attrgetter(name)(before):
            option = "--" + name.replace("_", "-")
            raise UserError(f"--resume continues with {option} {attrgetter(name)(before)} of the run: leave it out")


def continue_run(trainer: Trainer, config: Config, folder: Path, from_weights: bool) -> None:
    """Bring the trainer to where the run ended: to its last intact checkpoint or, where asked, to its weights."""
    checkpoints, settings = trainer.checkpoints, config.train
    record = run_on_rank0(lambda: read_record(folder))
    if from_weights:
        if checkpoints.steps():
            abort_all_ranks(f"{checkpoints.folder} has checkpoints: leave out --from-weights, or move that folder away")
        if record is None:
            abort_all_ranks(f"{folder} has no weights that say how far they were trained")
        load_final(folder, trainer.model)
        trainer.restore_state(record.state)
        console.say("resumed", f"from the weights of step {record.step}, with a fresh optimizer")
    else:
        step = trainer.restore()
        if step is not None:
            console.say("resumed", f"from step {step} of {settings.steps}")
        elif checkpoints.steps() or (folder / run_dir.WEIGHTS).exists():
            found, first = ("no intact", f"move {checkpoints.folder} away and ") if checkpoints.steps() else ("no", "")
            advice = f"; to go on from its weights, with a fresh optimizer: {first}add --from-weights" if record else ""
            abort_all_ranks(f"{folder} has {found} checkpoint{advice}")
        else:
            console.say("resumed", f"from step 0 of {settings.steps}: there is no checkpoint yet")
    state = trainer.state
    before, status = run_on_rank0(
        lambda: (configs.load(folder / run_dir.CONFIG).train, run_dir.load_metadata(folder).get("status"))
    )
    changed = (before.steps, before.seconds) != (settings.steps, settings.seconds)
    ended = status == "finished" and record is not None and record.step >= state.step
    if changed or ended:  # else, after its last step: it was stopped or killed before its end was done
        if state.step >= settings.steps:
            abort_all_ranks(f"{folder} has all its {settings.steps} steps; for more give a larger --train.steps")
        if settings.seconds and state.seconds >= settings.seconds:
            spent = f"{state.seconds:.0f} s of training are spent"
            abort_all_ranks(f"{spent}, --train.seconds is {settings.seconds:g}: give more")
    if before.eval_tokens != settings.eval_tokens:
        state.validation_loss = None  # of another evaluation
