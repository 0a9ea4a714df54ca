"""The linear layer of inference: the public functions (op.py, packed.py), their kernels and specification."""

from .op import packed_linear
from .packed import PackedWeight, pack_weight

__all__ = ["PackedWeight", "pack_weight", "packed_linear"]
