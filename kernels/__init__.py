"""Fused kernels for language models: one function per op, the same call on every backend.

>>> from fastllm.kernels import rms_norm
>>> y = rms_norm(x, weight)

Ops: flash_attention, flash_decode, rms_norm, softmax, cross_entropy, linear_cross_entropy, linear_log_prob,
linear_jsd, packed_linear (of a weight that pack_weight made), rope, rope_append, swiglu. ``explain(op, ...)`` tells
which backend a call runs on and why; ``use_backend`` and the environment variable FASTLLM_BACKEND prefer one.
"""

if __name__ == "kernels":
    # In a checkout's folder transformers finds this one where it looks for Hugging Face's package of that name.
    # Our operators can be registered once only, and not under two names: there is nothing here by that one.
    __all__ = []
else:
    import warnings

    with warnings.catch_warnings():  # PyTorch warns at import where there is no numpy, which no kernel needs
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        import torch  # noqa: F401

    from .activation import swiglu
    from .attention import flash_attention, flash_decode
    from .backends import BACKENDS, Explanation, explain, use_backend
    from .linear import PackedWeight, pack_weight, packed_linear
    from .loss import cross_entropy, linear_cross_entropy, linear_jsd, linear_log_prob, softmax
    from .modules import CausalSelfAttention, CrossEntropyLoss, LinearCrossEntropyLoss, RMSNorm, SwiGLU
    from .norm import rms_norm
    from .rotary import rope, rope_append

    __all__ = [
        "BACKENDS",
        "CausalSelfAttention",
        "CrossEntropyLoss",
        "Explanation",
        "LinearCrossEntropyLoss",
        "PackedWeight",
        "RMSNorm",
        "SwiGLU",
        "cross_entropy",
        "explain",
        "flash_attention",
        "flash_decode",
        "linear_cross_entropy",
        "linear_jsd",
        "linear_log_prob",
        "pack_weight",
        "packed_linear",
        "rms_norm",
        "rope",
        "rope_append",
        "softmax",
        "swiglu",
        "use_backend",
    ]
