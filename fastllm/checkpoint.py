"""A run folder: what training leaves behind and generation reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from . import config as configs
from . import pretrained
from .config import Config
from .errors import UserError
from .files import write_atomic
from .model import GPT
from .tokenizer import Tokenizer
from .weights import load_weights

CONFIG, TOKENIZER, WEIGHTS, META = "config.toml", "tokenizer.json", "model.safetensors", "run.json"


def save_meta(run: Path, meta: dict[str, Any]) -> None:
    write_atomic(run / META, (json.dumps(meta, indent=2) + "\n").encode())


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, its tokenizer and the contents of run.json; ``run`` may be a Hugging Face folder too."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}")
    if (run / pretrained.CONFIG).is_file():
        return pretrained.load(run, device)
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
    model = load_weights(config.model, run / WEIGHTS)
    try:
        meta = json.loads((run / META).read_text())
    except ValueError as error:
        raise UserError(f"{run / META} is not valid JSON: {error}") from None
    return model.to(device).eval(), tokenizer, meta
