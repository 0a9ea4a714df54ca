"""What the attention kernels are told beside the tensors."""

from __future__ import annotations

from typing import NamedTuple

UNBOUNDED = 2**31 - 1  # of a window: farther than any key


class Options(NamedTuple):
    """csrc/attention.h: query i stands at key position p = i + seq_k - seq_q and sees the keys p - left to p + right.

    Neither is negative, and UNBOUNDED is no bound; a softcap of 0 is none.
    """

    scale: float
    left: int
    right: int
    softcap: float

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def window(self) -> int:
        """Keys of a causal window, 0: all."""
        return self.left + 1 if self.left < UNBOUNDED else 0


def bounds(causal: bool, window: int) -> tuple[int, int]:
    """``left`` and ``right`` of a causal window of that many keys (0: all), or of no bounds."""
    left = min(window - 1, UNBOUNDED) if window else UNBOUNDED
    return (left, 0) if causal else (UNBOUNDED, UNBOUNDED)
