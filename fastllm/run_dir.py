"""A run folder: what training leaves behind and generation reads."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import config as configs
from .config import Config
from .data.tokenizer import Tokenizer
from .errors import UserError
from .files import atomic, write_atomic
from .model.gpt import GPT
from .model.weights import load_weights

CONFIG, TOKENIZER, WEIGHTS, META = "config.toml", "tokenizer.json", "model.safetensors", "run.json"
TOKENS = {"train": "data/train.npy", "validation": "data/validation.npy"}


def save_meta(run: Path, meta: dict[str, Any]) -> None:
    write_atomic(run / META, (json.dumps(meta, indent=2) + "\n").encode())


def load_meta(run: Path) -> dict[str, Any]:
    """The contents of run.json."""
    try:
        return json.loads((run / META).read_text())
    except OSError as error:
        raise UserError(f"can't read {run / META}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{run / META} is not valid JSON: {error}") from None


def save_tokens(run: Path, tokens: dict[str, np.ndarray]) -> None:
    """The encoded text, ``train`` and ``validation``: going on with a run needs no other."""
    for name, array in tokens.items():
        (run / TOKENS[name]).parent.mkdir(exist_ok=True)
        with atomic(run / TOKENS[name]) as part, open(part, "wb") as file:
            np.save(file, array, allow_pickle=False)


def load_tokens(run: Path) -> dict[str, np.ndarray]:
    """What :func:`save_tokens` wrote, mapped, not read."""
    try:
        return {name: np.load(run / file, mmap_mode="r", allow_pickle=False) for name, file in TOKENS.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the encoded text of {run}: {error}") from None


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
    model = load_weights(config.model, run / WEIGHTS)
    return model.to(device).eval(), tokenizer, load_meta(run)


def check_free(out: Path) -> None:
    """Nothing in a run folder is ever overwritten."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a new folder")
    if out.is_dir() and any(out.iterdir()):
        what = "already holds a run" if (out / META).exists() else "is not empty"
        raise UserError(f"{out} {what}; choose another folder with --out")


def claim(out: Path | None) -> Path:
    """Make the run folder; where none is named a new one, so that no two runs share it."""
    named = out is not None
    out = out or Path("runs", datetime.now().strftime("%Y%m%d-%H%M%S"))
    try:
        if named:
            out.mkdir(parents=True, exist_ok=True)
            check_free(out)
            return out
        for number in range(1, 1000):
            try:
                fresh = out.with_name(out.name + (f"-{number}" if number > 1 else ""))
                fresh.mkdir(parents=True)
                return fresh
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"can't make the run folder {out}: {error.strerror}") from None
    raise UserError(f"can't make the run folder {out}: too many of that name")
