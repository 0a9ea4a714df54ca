"""What the attention kernels are told beside the tensors."""

from __future__ import annotations

from typing import NamedTuple

from .. import checks

UNBOUNDED = 2**30  # of a window: farther than any key, and sums of two fit in 32 bits


class Options(NamedTuple):
    """csrc/attention.h: query i stands at key position p = i + seq_k - seq_q and sees the keys p - left to p + right.

    Neither is negative, and UNBOUNDED is no bound; a softcap of 0 is none.
    """

    scale: float
    left: int
    right: int
    softcap: float

    @property
    def windowed(self) -> bool:
        return self.left < UNBOUNDED or 0 < self.right < UNBOUNDED


Window = int | tuple[int | None, int | None] | None


def bounds(op: str, causal: bool, window: Window) -> tuple[int, int]:
    """``left`` and ``right`` of the public arguments."""
    if window is None:
        return UNBOUNDED, 0 if causal else UNBOUNDED
    if isinstance(window, (tuple, list)):
        if len(window) != 2:
            raise ValueError(f"{op}: window must be a number of keys or (left, right), not {window}")
        left, right = window
    else:
        keys = checks.integer(op, "window", window)
        if keys < 1 or not causal:
            raise ValueError(
                f"{op}: window ({keys}) must be at least 1, with causal=True; without, pass (left, right), how many "
                "keys before and after its own position a query sees"
            )
        left, right = keys - 1, 0
    left, right = (_bound(op, n) for n in (left, right))
    return left, 0 if causal else right


def _bound(op: str, keys: int | None) -> int:
    if keys is None:
        return UNBOUNDED
    keys = checks.integer(op, "window", keys)
    return UNBOUNDED if keys < 0 else min(keys, UNBOUNDED)
