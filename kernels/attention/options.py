"""What the attention kernels are told beside the tensors."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """csrc/attention.h; a window or softcap of 0 is none."""

    scale: float
    causal: bool
    window: int
    softcap: float
