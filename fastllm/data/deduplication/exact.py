"""Exact duplicates: documents whose texts differ at most in white space."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from .arrays import Rows, equal_runs

KEY_BYTES = 16  # two of 10 ** 12 documents share a key by chance once in 10 ** 14 corpora


def exact_key(text: str) -> bytes:
    """16 bytes that are equal for equal texts: their BLAKE2b hash, each run of white space taken as one space.

    White space at the ends doesn't count. Case, digits and punctuation count: what differs in them may differ in
    meaning, as code does, and MinHash judges it. (CCNet, C4 and FineWeb drop them, for parts of a page that they
    compare, or for MinHash.)
    """
    return blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def exact_duplicates(keys: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """For each document the number of the first document with its key, or -1 where it is the first.

    Args:
        keys: those of all documents in order, uint8 ``[documents, 16]``; or arrays of some documents each, which may be
            memory-mapped. Beside them this takes 16 bytes for each document.
    """
    rows = Rows([keys] if isinstance(keys, np.ndarray) else keys)
    result = np.full(len(rows), -1, np.int64)
    bits = max(1, (len(rows) - 1).bit_length())
    packed = np.empty(len(rows), np.uint64)
    for start, block in rows.blocks(1 << 16):
        heads = np.ascontiguousarray(block[:, :8]).view("<u8")[:, 0]
        packed[start : start + len(block)] = heads >> np.uint64(bits) << np.uint64(bits)
    packed |= np.arange(len(rows), dtype=np.uint64)
    documents, groups = equal_runs(packed, bits)
    del packed
    first: dict[bytes, int] = {}
    group = -1
    for i in range(0, len(documents), 1 << 14):
        numbers = documents[i : i + (1 << 14)].astype(np.int64)
        whole = rows.take(numbers)
        for number, its_group, key in zip(numbers.tolist(), groups[i : i + (1 << 14)].tolist(), whole, strict=True):
            if its_group != group:
                first, group = {}, its_group
            if (leader := first.setdefault(key.tobytes(), number)) != number:
                result[number] = leader
    return result
