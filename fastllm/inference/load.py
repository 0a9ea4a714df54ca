"""Models of any kind by their path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import run_dir
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..huggingface import load as huggingface
from ..model.gpt import GPT


def load_run(path: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, its tokenizer and the contents of run.json; ``path`` may be a Hugging Face folder too."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no run folder {path}")
    if (path / huggingface.CONFIG).is_file():
        return huggingface.load(path, device)
    return run_dir.load_run(path, device)
