"""The launchers of attention in Triton; each has a file with its kernels."""

from .triton_backward import attention_backward
from .triton_decode import attention_decode
from .triton_forward import attention_forward

__all__ = ["attention_backward", "attention_decode", "attention_forward"]
