"""Gated activations: the public function (op.py) and its specification."""

from .op import swiglu

__all__ = ["swiglu"]
