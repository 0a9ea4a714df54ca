"""Attention: the public functions (op.py, decode_op.py), their operators, kernels and specification."""

from .decode_op import flash_decode
from .op import flash_attention

__all__ = ["flash_attention", "flash_decode"]
