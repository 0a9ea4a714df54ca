"""Triton's interpreter, with two faults of it in bfloat16 mended (found in 3.6.0 and 3.9.0).

Where it is from Triton 3.6 it needs NumPy older than 2.4.

It stores bfloat16 as uint16 and so multiplies the operands of ``tl.dot`` as integers; and it rounds
float32 to bfloat16 toward zero, where a GPU rounds to nearest even.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@contextmanager
def mended() -> Iterator[None]:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def mended_convert(data, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(data).reshape(data.shape)
        return convert(data, source, target, rounding_mode)

    def mended_dot(self, a, b, d, *rest):
        a, b = (
            interpreter.TensorHandle(to_float32(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
            for t in (a, b)
        )
        return dot(self, a, b, d, *rest)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = mended_convert, mended_dot
    try:
        with np.errstate(all="ignore"):  # a GPU doesn't warn either
            yield
    finally:
        interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert, dot
