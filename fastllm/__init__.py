"""fastllm: fused kernels (``fastllm.kernels``) and the language model that is built from them."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names and their modules, which are imported at first use: the command line starts without PyTorch.
_MODULES = {
    "GPT": "model.gpt",
    "Config": "config",
    "ModelConfig": "config",
    "Tokenizer": "data.tokenizer",
    "export": "huggingface.export",
    "from_pretrained": "huggingface.load",
    "load": "inference.load",
    "patch": "huggingface.patching",
    "patched": "huggingface.patching",
    "train": "training.pretrain",
    "unpatch": "huggingface.patching",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
