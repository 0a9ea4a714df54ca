"""Weights in safetensors files; nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError
from ..files import atomic
from .gpt import GPT
from .safetensors_header import read_header


def save_weights(path: str | Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors``. A tied head is the embedding and has no entry of its own.

    ``metadata``: what else the file says, such as the fingerprint of its tokenizer as ``"tokenizer"``.
    """
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    with atomic(path) as part:
        try:
            save_file(tensors, part, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def read_weights_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; UserError where it can't be read."""
    return read_header(path).metadata


def load_weights(config: ModelConfig, *paths: str | Path, dtype: torch.dtype | None = None) -> GPT:
    """A GPT on the CPU with the weights of one file or several, in ``dtype`` (None: that of the files).

    Raises UserError where a file can't be read, or its names, shapes or dtypes are not the model's.
    """
    with torch.device("meta"):
        model = GPT(config, seed=None)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= {name: t if dtype is None else t.to(dtype) for name, t in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"can't read the weights {path}: {error}") from None
    own, path = model.state_dict(), paths[0] if len(paths) == 1 else Path(paths[0]).parent
    head = tensors.pop("lm_head.weight", None) if model.lm_head is None else None  # tied, and in the file once more
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}  # old files' tables
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
    dtypes = sorted({str(t.dtype) for t in tensors.values()})
    if len(dtypes) > 1:
        raise UserError(f"{path} holds weights of several dtypes ({', '.join(dtypes)}): pass dtype to choose one")
    embedding = tensors["model.embed_tokens.weight"]
    if head is not None and not torch.equal(head.to(embedding.dtype), embedding):
        raise UserError(
            f"{path} does not fit the model: its lm_head.weight is not the embedding, but the configuration ties them"
        )
    model.load_state_dict(tensors, assign=True)
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
