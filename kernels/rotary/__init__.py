"""Rotary position embedding: the public functions and their specifications."""

from .append_op import rope_append
from .op import rope

__all__ = ["rope", "rope_append"]
