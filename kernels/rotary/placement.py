"""Where the tokens of a step stand."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Placement(NamedTuple):
    """Tables of the rotation, and each token's row in them and its slot in the caches."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
