"""Tensors of GGUF files, dequantised some rows at a time: beside the result, memory holds little more."""

from __future__ import annotations

import math
from io import BufferedReader

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..input_files import open_regular
from .header import Header, TensorInfo

CHUNK = 2**22  # values that are dequantised at a time, a row at least

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(header: Header, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the file, as ``dtype``."""
    with open_regular(header.path, "the model ") as file:
        return read_from(file, header, name, dtype)


def read_from(file: BufferedReader, header: Header, name: str, dtype: torch.dtype) -> Tensor:
    """The same, of a file that is open."""
    info = header.tensors[name]
    columns, rows = info.shape[-1], math.prod(info.shape[:-1])
    tensor = torch.empty(info.shape, dtype=dtype)
    flat, step = tensor.view(rows, columns), max(CHUNK // columns, 1)
    try:
        file.seek(info.offset)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            content = bytearray(count * info.row_size)
            if file.readinto(content) != len(content):
                raise UserError(f"can't read the model {header.path}: it ends within the tensor {name}")
            flat[first : first + count] = _values(content, info, count)
    except OSError as error:
        raise UserError(f"can't read the model {header.path}: {error.strerror}") from None
    return tensor


def _values(content: bytearray, info: TensorInfo, rows: int) -> Tensor:
    """The values of some rows, as the file has them, or float32 where it has them quantised."""
    if info.type.name in FLOATS:
        return torch.frombuffer(content, dtype=FLOATS[info.type.name]).view(rows, -1)
    from gguf import GGMLQuantizationType, quants

    blocks = np.frombuffer(content, np.uint8).reshape(rows, -1)
    with np.errstate(all="ignore"):  # values that are not finite are found later
        return torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType[info.type.name]))
