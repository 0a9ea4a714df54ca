"""What the cross-entropy kernels are told beside the tensors."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

from ..library import Size, arguments


class Options(NamedTuple):
    """The logits are columns ``first_class`` and on of ``classes`` in all (csrc/cross_entropy.h)."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    first_class: Size
    classes: Size


SCHEMA = arguments(get_type_hints(Options))  # the same in an operator's schema
