"""The files of a run folder."""

from __future__ import annotations

import json
import os
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from . import config as configs
from .data.chat_template import read_chat_template
from .data.tokenizer import END_OF_TURN, Tokenizer
from .errors import UserError
from .files import write_atomic
from .input_files import read_json, shown
from .model.gpt import GPT
from .model.weights import load_weights, read_weights_metadata

CONFIG, TOKENIZER, WEIGHTS, METADATA = "config.toml", "tokenizer.json", "model.safetensors", "run.json"
TOKENS = "tokens"  # the folder of tokens that was made for the run
GENERATION = "generation_config.json"  # of a model that was trained to chat: the tokens that end generation


def save_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    write_atomic(folder / METADATA, (json.dumps(metadata, indent=2) + "\n").encode())


def load_metadata(folder: Path) -> dict[str, Any]:
    """The contents of run.json."""
    return read_json(folder / METADATA)


def load_run(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer]:
    """The trained model in eval mode, and its tokenizer. ``dtype``: of the weights; None: that of the file."""
    missing = [name for name in (CONFIG, TOKENIZER, WEIGHTS, METADATA) if not (folder / name).is_file()]
    if missing:
        why = "its training has not finished" if missing == [WEIGHTS] else "it is not a complete run"
        raise UserError(f"{folder} has no {', '.join(missing)}: {why}")
    config = configs.load_model(folder / CONFIG)
    eos_ids = read_eos_ids(config.vocab_size, folder / GENERATION)
    tokenizer = Tokenizer.load(folder / TOKENIZER, eos_ids)
    # Of a model that was tuned: models of others round their vocabulary up.
    if tokenizer.vocab_size != config.vocab_size and not (eos_ids and tokenizer.vocab_size < config.vocab_size):
        raise UserError(
            f"{folder}: {TOKENIZER} has {tokenizer.vocab_size} tokens, "
            f"but model.vocab_size in {CONFIG} is {config.vocab_size}"
        )
    trained_with = read_weights_metadata(folder / WEIGHTS).get("tokenizer")
    check_tokenizer(tokenizer, folder / TOKENIZER, folder / WEIGHTS, trained_with)
    eos = tokenizer.backend.id_to_token(tokenizer.eos_id) or ""
    tokenizer.chat_template = read_chat_template(folder, {"bos_token": eos, "eos_token": eos})
    if not eos_ids and tokenizer.chat_template and (end := tokenizer.backend.token_to_id(END_OF_TURN)) is not None:
        tokenizer.eos_ids = (tokenizer.eos_id, end)
    model = load_weights(config, folder / WEIGHTS, dtype=dtype)
    return model.to(device).eval(), tokenizer


def read_eos_ids(vocab_size: int, *files: Path) -> tuple[int, ...]:
    """The tokens that end a text, ``eos_token_id`` of the first file that names any; none where no file does."""
    for file in files:
        value = read_json(file).get("eos_token_id") if os.path.lexists(file) else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            wanted = f"tokens from 0 to {vocab_size - 1}"
            raise UserError(f"{file}: eos_token_id must be one or several {wanted}, it is {shown(value)}")
        if ids:
            return tuple(ids)
    return ()


def check_tokenizer(tokenizer: Tokenizer, path: Path, weights: Path, fingerprint: Any) -> None:
    """Raise UserError where a file of weights has the fingerprint of another tokenizer than that at ``path``."""
    if fingerprint is not None and fingerprint != tokenizer.fingerprint:
        raise UserError(f"the weights {weights} were trained with another tokenizer than {path}")


def require_empty(folder: Path) -> None:
    """Raise UserError unless ``folder`` is new or empty: nothing in a run folder is ever overwritten."""
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
        is_empty = not is_folder or not any(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"can't use the run folder {folder}: {error.strerror}") from None
    if not is_folder:
        raise UserError(f"{folder} is a file; --out names a new folder")
    if not is_empty:
        what = "already holds a run" if (folder / METADATA).exists() else "is not empty"
        raise UserError(f"{folder} {what}; choose another folder with --out")


def create(folder: Path | None) -> Path:
    """Make the run folder; None: a new one under runs/, which no other run shares."""
    new = folder or Path("runs", datetime.now().strftime("%Y%m%d-%H%M%S"))
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            require_empty(folder)
            return folder
        for number in range(1, 1000):
            try:
                numbered = new.with_name(new.name + (f"-{number}" if number > 1 else ""))
                numbered.mkdir(parents=True)
                return numbered
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"can't make the run folder {new}: {error.strerror}") from None
    raise UserError(f"can't make the run folder {new}: too many of that name")
