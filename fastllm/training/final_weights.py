"""The weights of a run, with a record of how they came about: good ones are never replaced by worse ones."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import console
from ..dtensor import local_slice, to_local
from ..errors import UserError
from ..model.weights import read_weights_metadata, save_weights
from ..run_dir import WEIGHTS
from .state import is_state

RECORD = "training"  # the key of the weights' metadata


@dataclass(frozen=True)
class WeightsRecord:
    """How far the weights were trained."""

    finished: bool  # the run had reached its end
    state: Mapping[str, Any]  # of training, as in a checkpoint

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def validation_loss(self) -> float | None:
        return self.state["validation_loss"]


def read_record(folder: Path) -> WeightsRecord | None:
    """The record in the run's weights; None where there are no weights, none that can be read, or no record in them."""
    try:
        record = WeightsRecord(**json.loads(read_weights_metadata(folder / WEIGHTS)[RECORD]))
    except (UserError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if type(record.finished) is bool and is_state(record.state) else None


def save_final(folder: Path, weights: dict[str, Tensor], record: WeightsRecord, metadata: Mapping[str, str]) -> None:
    """Write the weights, unless those that are there are of a run that had finished, or of a later step.

    Those of a finished run are replaced by those of a finished run only. Where these are not known to be better, by
    the validation loss, the old ones are kept beside them.
    """
    path = folder / WEIGHTS
    before = read_record(folder)
    if before is not None and not record.finished and (before.finished or before.step > record.step):
        what = "of the finished run" if before.finished else "a later one"
        console.say("weights", f"{WEIGHTS} stays that of step {before.step}, {what}; the checkpoint has {record.step}")
        return
    metadata = {**metadata, RECORD: json.dumps(asdict(record))}
    if not path.exists() or (before is not None and (not before.finished or _is_better(record, before))):
        save_weights(path, weights, metadata)
        return
    kept = _free_name(folder, f"model-step-{before.step:08d}" if before else "model-before")
    new = path.with_name("model-new.safetensors")
    save_weights(new, weights, metadata)
    os.replace(path, kept)
    os.replace(new, path)
    console.say("weights", f"those from before are in {kept.name}: by the validation loss the new ones are not better")


def _free_name(folder: Path, stem: str) -> Path:
    names = (f"{stem}{suffix}.safetensors" for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    return next(folder / name for name in names if not (folder / name).exists())


def _is_better(new: WeightsRecord, old: WeightsRecord) -> bool:
    if new.validation_loss is None or old.validation_loss is None:
        return False
    return new.validation_loss <= old.validation_loss


@torch.no_grad()
def load_final(folder: Path, model: nn.Module) -> None:
    """Fill ``model``, sharded or not, with the weights of the run: each rank reads its part.

    Raises UserError where they can't be read or are not the model's.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for name, parameter in model.named_parameters():
                tensor = file.get_slice(name)
                if tensor.get_shape() != list(parameter.shape):
                    raise UserError(f"{folder / WEIGHTS}: {name} is {tensor.get_shape()}, not {list(parameter.shape)}")
                to_local(parameter).copy_(tensor[local_slice(parameter)])
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read the weights {folder / WEIGHTS}: {error}") from None
