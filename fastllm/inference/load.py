"""Models by their path, whatever kind of folder or file it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .. import run_dir
from ..errors import UserError
from ..gguf import load as gguf
from ..huggingface import load as huggingface

if TYPE_CHECKING:
    import torch

    from ..data.tokenizer import Tokenizer
    from ..model.gpt import GPT


def load(
    path: str | Path, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer]:
    """A trained model in eval mode and its tokenizer.

    Args:
        path: a run folder of ``fastllm train``, a Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3, or a GGUF
            file of the architectures llama, qwen2 and qwen3.
        device: where the model is placed.
        dtype: of the weights; None: that of the files, and float32 where a GGUF file has them quantised.

    Raises:
        UserError: there is no such folder or file, files are missing or damaged, or the model is of another kind.
    """
    path = Path(path)
    if os.path.isfile(path):
        return gguf.load(path, device, dtype)
    if not os.path.isdir(path):
        raise UserError(f"there is no run folder {path}")
    is_theirs = os.path.lexists(path / huggingface.CONFIG)
    return (huggingface.load if is_theirs else run_dir.load_run)(path, device, dtype)
