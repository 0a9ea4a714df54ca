"""The headers of safetensors files: names, dtypes and shapes, checked against the file before a tensor is read."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..input_files import JSON_LIMIT, one_line, open_regular, parse_json, shown

# The dtypes that a GPT can have.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """A header: its tensors by name, and the metadata."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file whose tensors fill the file exactly; UserError for any other file."""
    with open_regular(path, "the weights ") as file:
        try:
            available = os.fstat(file.fileno()).st_size - 8
            size = int.from_bytes(file.read(8), "little")
            if size > min(available, JSON_LIMIT):
                raise UserError(
                    f"can't read the weights {path}: its header would have {size:,} bytes; "
                    "is it a whole safetensors file?"
                )
            content = file.read(size)
        except OSError as error:
            raise UserError(f"can't read the weights {path}: {error.strerror}") from None
    values = parse_json(content, f"can't read the weights {path}: its header")
    metadata = values.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"can't read the weights {path}: __metadata__ must map strings to strings")
    spans, tensors = [], {}
    for name, value in values.items():
        try:
            tensors[name], span = _entry(value)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"can't read the weights {path}: {one_line(name)}: {one_line(error)}") from None
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise UserError(f"can't read the weights {path}: its tensors overlap or leave gaps at byte {start} of data")
        end = stop
    if end != available - size:
        raise UserError(
            f"can't read the weights {path}: its header describes {end:,} bytes of data, "
            f"the file has {available - size:,}"
        )
    return Header(tensors, metadata)


def _entry(value: Any) -> tuple[Entry, tuple[int, int]]:
    """A tensor's entry, and where its bytes begin and end."""
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} describes no tensor")
    dtype: Any = value.get("dtype")
    shape: Any = value.get("shape")
    span: Any = value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {shown(dtype)}; fastllm's GPT reads {', '.join(DTYPES)}")
    for key, numbers in (("shape", shape), ("data_offsets", span)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{key} is {shown(numbers)}, not a list of whole numbers")
    if len(span) != 2 or span[1] - span[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"data_offsets {shown(span)} do not fit {dtype} {shown(shape)}")
    return Entry(DTYPES[dtype], tuple(shape)), (span[0], span[1])
