"""Softmax and the losses on it: the public functions (op.py) and their specifications."""

from .op import cross_entropy, linear_cross_entropy, linear_log_prob, softmax

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_log_prob", "softmax"]
