"""Attention: the public function (op.py) and its specification."""

from .op import flash_attention

__all__ = ["flash_attention"]
