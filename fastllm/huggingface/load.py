"""Models from Hugging Face folders: config.json, safetensors and tokenizer.json.

The GPT covers four layouts of transformers: Llama, Mistral (a window), Qwen2 (biases) and Qwen3 (normalised queries
and keys, a window).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data.chat_template import read_chat_template
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..input_files import Keys, read_json
from ..model.gpt import GPT
from ..model.weights import load_weights, read_weights_metadata
from ..run_dir import GENERATION, check_tokenizer, read_eos_ids
from .model_config import model_config

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TOKENIZER, WEIGHTS = "tokenizer.json", "model.safetensors"


def from_pretrained(
    path: str | Path,
    *,
    max_seq_len: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """The model in a Hugging Face folder, in eval mode.

    Args:
        path: a folder with config.json and safetensors, in one file or several, of a Llama, Mistral, Qwen2 or Qwen3.
        max_seq_len: tokens that the model sees at once; None: what its configuration says, which is also the most.
        dtype: of the weights; None: that of the files.
        device: where the model is placed.

    Raises:
        UserError: there is no such folder, its configuration has something that the GPT does not have, or the weights
            don't fit the configuration or are not finite. Pickled weights are not read.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path} (hf download NAME --local-dir FOLDER gets a model from the Hub)")
    config = model_config(path / CONFIG)
    if max_seq_len is not None:
        if not 0 < max_seq_len <= config.max_seq_len:
            limit = f"{config.max_seq_len} of {path / CONFIG}"
            raise UserError(f"max_seq_len must be from 1 to the {limit}, it is {max_seq_len}")
        config = replace(config, max_seq_len=max_seq_len)
    return load_weights(config, *_weight_files(path), dtype=dtype).to(device).eval()


def load(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[GPT, Tokenizer]:
    """The model in eval mode, and its tokenizer. ``dtype``: of the weights; None: that of the files."""
    if not os.path.lexists(path / TOKENIZER):
        raise UserError(f"{path} has no {TOKENIZER}")
    vocab_size = model_config(path / CONFIG).vocab_size
    tokenizer = Tokenizer.load(path / TOKENIZER, eos_ids=read_eos_ids(vocab_size, path / GENERATION, path / CONFIG))
    if tokenizer.vocab_size > vocab_size:  # fewer is fine: models round their vocabulary up
        raise UserError(
            f"{path}: {TOKENIZER} has {tokenizer.vocab_size} tokens, but vocab_size in {CONFIG} is {vocab_size}"
        )
    for file, metadata in _weights_metadata(path):
        check_tokenizer(tokenizer, path / TOKENIZER, file, metadata.get("tokenizer"))
    tokenizer.chat_template = read_chat_template(path)
    return from_pretrained(path, dtype=dtype, device=device), tokenizer


def _weight_files(path: Path) -> list[Path]:
    if os.path.lexists(path / WEIGHTS):
        return [path / WEIGHTS]
    if os.path.lexists(path / INDEX):
        files = Keys(path / INDEX, read_json(path / INDEX)).table("weight_map").values.values()
        names = sorted({name if isinstance(name, str) else "" for name in files})
        if not names or not all(map(_is_file_name, names)):
            raise UserError(f"{path / INDEX}: weight_map names no files beside it")
        return [path / name for name in names]
    pickled = any(path.glob("pytorch_model*.bin"))
    hint = "; its weights are pickled: have transformers load and save_pretrained them first" if pickled else ""
    raise UserError(f"{path} has no {WEIGHTS}{hint}")


def _weights_metadata(path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """What the files of weights say of themselves, and the index of several."""
    for file in _weight_files(path):
        yield file, read_weights_metadata(file)
    if not os.path.lexists(path / WEIGHTS):
        yield path / INDEX, Keys(path / INDEX, read_json(path / INDEX)).table("metadata").values


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", "..") and name.isprintable() and len(name) <= 255
