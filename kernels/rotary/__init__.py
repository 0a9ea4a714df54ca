"""Rotary position embedding: the public function (op.py) and its specification."""

from .op import rope

__all__ = ["rope"]
