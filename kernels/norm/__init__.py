"""RMSNorm: the public function (op.py), its specification, and its kernels."""

from .op import rms_norm

__all__ = ["rms_norm"]
