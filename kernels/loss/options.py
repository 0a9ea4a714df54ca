"""What the cross-entropy kernels are told beside the tensors."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """The logits are columns ``first_class`` and on of ``classes`` in all (csrc/cross_entropy.h)."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    first_class: int
    classes: int


# the same in an operator's schema
SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap, SymInt first_class, SymInt classes"
