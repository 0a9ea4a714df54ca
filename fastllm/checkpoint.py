"""A run folder: what training leaves behind and generation reads. Weights are safetensors; nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import config as configs
from .config import Config
from .errors import UserError
from .files import atomic, write_atomic
from .model import GPT
from .tokenizer import Tokenizer

CONFIG, TOKENIZER, WEIGHTS, META = "config.toml", "tokenizer.json", "model.safetensors", "run.json"


def save_weights(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """A tied head has no entry of its own: it is the embedding."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    with atomic(path) as part:
        try:
            save_file(tensors, part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def load_weights(model: GPT, path: str | Path) -> None:
    """Fill ``model``; the names and shapes in the file must be the model's."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read the weights {path}: {error}") from None
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has the unknown {_some(unknown)}"] * bool(unknown)
        raise UserError(f"{path} does not fit the model: it {' and '.join(parts)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{path} does not fit the model: {name} is {list(tensor.shape)}, "
                f"the configuration makes it {list(own[name].shape)}"
            )
    model.load_state_dict(tensors)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save_meta(run: Path, meta: dict[str, Any]) -> None:
    write_atomic(run / META, (json.dumps(meta, indent=2) + "\n").encode())


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, its tokenizer and the contents of run.json."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    missing = [name for name in (CONFIG, TOKENIZER, WEIGHTS, META) if not (run / name).is_file()]
    if missing:
        why = "its training has not finished" if missing == [WEIGHTS] else "it is not a whole run"
        raise UserError(f"{run} has no {', '.join(missing)}: {why}")
    config: Config = configs.load(run / CONFIG)
    tokenizer = Tokenizer.load(run / TOKENIZER)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{run}: {TOKENIZER} has {tokenizer.vocab_size} tokens, "
            f"but model.vocab_size in {CONFIG} is {config.model.vocab_size}"
        )
    model = GPT(config.model)
    load_weights(model, run / WEIGHTS)
    try:
        meta = json.loads((run / META).read_text())
    except ValueError as error:
        raise UserError(f"{run / META} is not valid JSON: {error}") from None
    return model.to(device).eval(), tokenizer, meta
