"""What the attention kernels are told beside the tensors."""

from __future__ import annotations

from typing import NamedTuple

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
        window = (None, None)
    elif isinstance(window, int):
        if window < 1 or not causal:
            raise ValueError(
                f"{op}: window ({window}) must be at least 1, with causal=True; without, pass (left, right), how many "
                "keys before and after its own position a query sees"
            )
        window = (window - 1, 0)
    if len(window) != 2:
        raise ValueError(f"{op}: window must be a number of keys or (left, right), not {window}")
    left, right = (UNBOUNDED if n is None or n < 0 else min(int(n), UNBOUNDED) for n in window)
    return left, 0 if causal else right
