"""fastllm: fused kernels (``fastllm.kernels``) and the language model that is built from them."""

__version__ = "0.1.0"
