"""fastllm: fused kernels (``fastllm.kernels``) and the language model that is built from them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels
    from .config import Config, ModelConfig
    from .data.tokenizer import Tokenizer
    from .evaluation import evaluate
    from .huggingface.export import export
    from .huggingface.load import from_pretrained
    from .huggingface.patching import patch, patched, unpatch
    from .inference.engine import Engine
    from .inference.load import load
    from .model.gpt import GPT
    from .training.pretrain import train

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "Config",
    "Engine",
    "ModelConfig",
    "Tokenizer",
    "__version__",
    "evaluate",
    "export",
    "from_pretrained",
    "kernels",
    "load",
    "patch",
    "patched",
    "train",
    "unpatch",
]

# The modules of these names, which are imported at first use: the command line starts without PyTorch.
_MODULES = {
    "GPT": "model.gpt",
    "Config": "config",
    "Engine": "inference.engine",
    "ModelConfig": "config",
    "Tokenizer": "data.tokenizer",
    "evaluate": "evaluation",
    "export": "huggingface.export",
    "from_pretrained": "huggingface.load",
    "load": "inference.load",
    "patch": "huggingface.patching",
    "patched": "huggingface.patching",
    "train": "training.pretrain",
    "unpatch": "huggingface.patching",
}


if not TYPE_CHECKING:  # for a type checker every name would exist

    def __getattr__(name: str) -> Any:
        if name == "kernels":
            return importlib.import_module(f"{__name__}.kernels")
        if name in _MODULES:
            try:
                return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] not in (__name__, "torch"):
                    from .errors import pip_install

                    error.add_note(f"fastllm.{name} needs what this installs: {pip_install('train')}")
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
