"""Weights in safetensors files; nothing is pickled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError
from ..files import atomic
from ..hardware import host_memory
from ..input_files import one_line
from .gpt import GPT
from .safetensors_header import Entry, read_header

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Fields that make no parameter, and that the configuration's checks hold together.
_UNSCALED: dict[str, Any] = {"rope_scaling": "none", "rope_factor": 1.0, "rope_original_max_seq_len": 0}


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

    The headers are compared with the configuration before anything of their sizes is allocated. Raises UserError
    where a file can't be read, its names, shapes or dtypes are not the model's, or a weight is not finite.
    """
    folder = paths[0] if len(paths) == 1 else Path(paths[0]).parent
    files: dict[str, str | Path] = {}
    entries: dict[str, Entry] = {}
    for path in paths:
        for name, entry in read_header(path).tensors.items():
            if name in files:
                raise UserError(f"{folder}: {one_line(name)} is both in {files[name]} and in {path}")
            if not name.endswith("rotary_emb.inv_freq"):  # tables in old files
                files[name], entries[name] = path, entry
    check_fit(config, entries, folder, dtype)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= _read(path, [name for name, file in files.items() if file == path], dtype)
    head = tensors.pop(HEAD, None) if config.tie_embeddings else None  # tied, and in the file once more
    if head is not None and not torch.equal(head.to(tensors[EMBEDDING].dtype), tensors[EMBEDDING]):
        raise UserError(
            f"{folder} does not fit the model: its {HEAD} is not the embedding, but the configuration ties them"
        )
    return assembled(config, tensors)


def assembled(config: ModelConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """The model of these very tensors, without copies of them."""
    with torch.device("meta"):
        model = GPT(config, seed=None)
    model.load_state_dict(tensors, assign=True)
    return model


def check_fit(
    config: ModelConfig,
    entries: Mapping[str, Entry],
    path: str | Path,
    dtype: torch.dtype | None,
    shown_name: Callable[[str], str] = one_line,
) -> None:
    """Raise UserError unless a model of this configuration has the tensors that the headers describe.

    ``shown_name``: what errors call a tensor of the model.
    """
    with torch.device("meta"):  # one layer stands for all: a wrong configuration may have a billion
        one = GPT(replace(config, layers=1, max_seq_len=1, **_UNSCALED), seed=None).state_dict()
    in_layer = [name for name in one if name.startswith("model.layers.0.")]
    layers = min(config.layers, len(entries) + 1)  # of more layers, these have no tensors
    own = {name: tuple(t.shape) for name, t in one.items() if name not in in_layer}
    for i in range(layers):
        own |= {name.replace("layers.0", f"layers.{i}", 1): tuple(one[name].shape) for name in in_layer}
    if config.tie_embeddings and HEAD in entries:
        own[HEAD] = own[EMBEDDING]
    missing, unknown = sorted(own.keys() - entries.keys()), sorted(entries.keys() - own.keys())
    if missing or unknown:
        lacking = len(missing) + (config.layers - layers) * len(in_layer)
        parts = [f"lacks {_some(map(shown_name, missing), lacking)}"] * bool(missing)
        parts += [f"has the unknown {_some(map(shown_name, unknown), len(unknown))}"] * bool(unknown)
        raise UserError(f"{path} does not fit the model: it {' and '.join(parts)}")
    for name, entry in entries.items():
        if entry.shape != own[name]:
            raise UserError(
                f"{path} does not fit the model: {shown_name(name)} is {list(entry.shape)}, "
                f"the configuration makes it {list(own[name])}"
            )
    tied = {HEAD} if config.tie_embeddings else set()
    dtypes = sorted({str(entry.dtype) for name, entry in entries.items() if name not in tied})
    if len(dtypes) > 1 and dtype is None:
        raise UserError(f"{path} holds weights of several dtypes ({', '.join(dtypes)}): pass dtype to choose one")
    size, memory = sum(entry.size for entry in entries.values()), _memory()
    if size > memory:
        raise UserError(f"{path} holds {size / 2**30:,.0f} GiB of weights, this machine has {memory / 2**30:,.0f}")


def _memory() -> int:
    """Bytes of memory of this machine and its GPUs."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return host_memory() + sum(torch.cuda.get_device_properties(i).total_memory for i in gpus)


def _read(path: str | Path, names: list[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors of a file by name, all finite."""
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                tensors[name] = tensor if dtype is None else tensor.to(dtype)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read the weights {path}: {one_line(error)}") from None
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    return tensors


def check_finite(tensor: Tensor, name: str, path: str | Path) -> None:
    """Raise UserError where a tensor of the file has NaN or infinite values."""
    low, high = torch.aminmax(tensor)
    if not (low.isfinite() and high.isfinite()):
        raise UserError(f"the weights {path} are not finite: {name} has NaN or infinite values")


def _some(names: Iterable[str], count: int) -> str:
    return ", ".join(islice(names, 3)) + (f" and {count - 3:,} more" if count > 3 else "")
