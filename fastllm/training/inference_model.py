"""The model of a run in training, whole and ready for the inference engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..dtensor import to_full
from ..model.gpt import GPT
from ..model.weights import assembled

State = dict[str, Tensor]
Merge = Callable[[State], State]  # of a model with adapters: its tensors, gathered, to those of a GPT


def inference_model(model: nn.Module, config: ModelConfig, precision: torch.dtype, merge: Merge | None = None) -> GPT:
    """A GPT of the weights as they are, gathered, on every rank; all ranks call this together."""
    with torch.no_grad():
        state = {name: to_full(tensor) for name, tensor in model.state_dict().items()}
        if merge is not None:
            state = merge(state)
        return assembled(config, {name: tensor.to(precision) for name, tensor in state.items()}).eval()
