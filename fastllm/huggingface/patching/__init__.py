"""fastllm's kernels in other people's models: :func:`patch` a Hugging Face transformers model instance."""

from .patching import PatchReport, patch, patched, unpatch

__all__ = ["PatchReport", "patch", "patched", "unpatch"]
