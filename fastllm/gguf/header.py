"""The headers of GGUF files: metadata and where the tensors lie, checked against the file before a tensor is read."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, pip_install, require_packages
from ..input_files import Keys, one_line, open_regular, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the first counted in 32 bits
LIMIT = 256 * 2**20  # bytes of metadata; files of 250,000 tokens have 10 million
MOST_DIMENSIONS = 4


class TensorType(NamedTuple):
    """How a tensor is stored: its values lie in blocks along a row."""

    name: str
    values: int  # in a block
    size: int  # bytes of a block


# The types that are read, by their numbers.
TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}


class TensorInfo(NamedTuple):
    """Where a tensor lies in the file, and how it is stored."""

    type: TensorType
    shape: tuple[int, ...]  # as PyTorch has it: rows first
    offset: int  # from the start of the file

    @property
    def row_size(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.type.values * self.type.size

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape[:-1]) * self.row_size


class Header(NamedTuple):
    """A header: its metadata by key, and the tensors by name."""

    path: Path
    metadata: Mapping[str, Any]  # an array is a list of strings, or an array of numpy
    tensors: Mapping[str, TensorInfo]

    def keys(self, prefix: str) -> Keys:
        """The metadata whose keys begin with ``prefix``, by the rest of the key."""
        found = {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}
        return Keys(self.path, found, prefix)


def read_header(path: str | Path) -> Header:
    """The header of a GGUF file whose tensors lie within it, side by side; UserError for any other file."""
    require_packages("reading a GGUF file", "gguf", install=pip_install("gguf"))
    path = Path(path)
    with open_regular(path, "the model ") as file:
        reader = _Reader(path, file)
        try:
            return reader.header()
        except OSError as error:
            raise UserError(f"can't read the model {path}: {error.strerror}") from None


class _Reader:
    """Reads values one after the other, and knows how many bytes there are."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file = path, file
        self.size, self.position = os.fstat(file.fileno()).st_size, 0
        self.what = "its beginning"  # what is read, for errors

    def wrong(self, problem: str) -> UserError:
        return UserError(f"can't read the model {self.path}: {problem}")

    def header(self) -> Header:
        if self.bytes(4) != MAGIC:
            raise self.wrong("it is not a GGUF file")
        version = self.number("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = f"{swapped} of another byte order" if swapped in VERSIONS else f"{version}"
            raise self.wrong(f"its GGUF version is {kind}; fastllm reads {' and '.join(map(str, VERSIONS))}")
        self.what = "its counts"
        tensors, keys = self.count(24), self.count(12)
        metadata: dict[str, Any] = {}
        for number in range(keys):
            self.what = f"the key {number + 1} of {keys}"
            key = self.string()
            self.what = f"the value of {one_line(key)}"
            if key in metadata:
                raise self.wrong(f"{one_line(key)} is in its metadata twice")
            metadata[key] = self.value(self.number("<I"))
        infos: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
        for number in range(tensors):
            self.what = f"the name of tensor {number + 1} of {tensors}"
            name = self.string()
            self.what = f"the tensor {one_line(name)}"
            if name in infos:
                raise self.wrong(f"it has {self.what} twice")
            infos[name] = self.tensor()
        alignment = Keys(self.path, metadata).integer("general.alignment", 32)
        if alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {alignment}, which is no power of two")
        start = -(-self.position // alignment) * alignment
        found = {name: TensorInfo(kind, shape, start + offset) for name, (kind, shape, offset) in infos.items()}
        self.check_places(found)
        return Header(self.path, metadata, found)

    def check_places(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise UserError where tensors overlap or don't lie within the file."""
        end = 0
        for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                raise self.wrong(f"the tensor {one_line(name)} overlaps another")
            end = info.offset + info.size
            if end > self.size:
                raise self.wrong(
                    f"the tensor {one_line(name)} ends at byte {end:,}, the file has {self.size:,}; is it cut?"
                )

    def tensor(self) -> tuple[TensorType, tuple[int, ...], int]:
        """Type, shape and offset in the data."""
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.wrong(f"{self.what} has {dimensions:,} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(dimensions)]))
        number, offset = self.number("<I"), self.number("<Q")
        kind = TYPES.get(number)
        if kind is None:
            names = ", ".join(known.name for known in TYPES.values())
            raise self.wrong(f"{self.what} is of the type {_type_name(number)}; fastllm reads {names}")
        if min(shape) < 1 or math.prod(shape) >= 2**62 or shape[-1] % kind.values:
            raise self.wrong(f"{self.what} has the shape {shown(list(shape))}, which {kind.name} can't have")
        return kind, shape, offset

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind == 9:
            return self.array()
        return self.number(_FORMATS[self.known(kind)])

    def array(self) -> Any:
        kind = self.number("<I")
        if kind == 8:
            return [self.string() for _ in range(self.count(8))]
        dtype = np.dtype(_FORMATS[self.known(kind)].replace("?", "u1"))  # any byte is a truth value
        return np.frombuffer(self.bytes(self.count(dtype.itemsize) * dtype.itemsize), dtype)

    def known(self, kind: int) -> int:
        if kind not in _FORMATS:
            raise self.wrong(f"{self.what} has the unknown type {kind}")
        return kind

    def string(self) -> str:
        try:
            return self.bytes(self.number("<Q")).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{self.what} is not UTF-8") from None

    def count(self, size: int) -> int:
        """A number of things of at least ``size`` bytes each, which the rest of the file can hold."""
        number = self.number("<Q")
        if number * size > self.size - self.position:
            raise self.wrong(f"{self.what} would be {number:,} things, more than the file holds; is it cut?")
        return number

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))[0]

    def bytes(self, size: int) -> bytes:
        if size > self.size - self.position:
            raise self.wrong(f"it ends within {self.what}; is it cut?")
        if self.position + size > LIMIT:
            raise self.wrong(f"{self.what} makes its header larger than {LIMIT:,} bytes")
        content = self.file.read(size)
        if len(content) < size:  # somebody is cutting it now
            raise self.wrong(f"it ends within {self.what}")
        self.position += size
        return content


# The layouts of the values of each type; 8 are strings, 9 arrays.
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"{number}, which is unknown"
