"""Softmax and the losses on it: the public functions (*_op.py), their specifications and kernels."""

from .cross_entropy_op import cross_entropy
from .jsd_op import linear_jsd
from .linear_op import linear_cross_entropy, linear_log_prob
from .softmax_op import softmax

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_jsd", "linear_log_prob", "softmax"]
