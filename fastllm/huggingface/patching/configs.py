"""The configuration of a patched model: a copy of the same type, that names another attention.

transformers reads in a module's configuration which attention function to call. Another model may hold the same
configuration, so patching leaves it as it is, and gives the modules of this model one copy.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_COPIED = "_fastllm_copied_configs"  # of a module: attribute -> the configuration, its copy, and the copy's values
_CHOICE = "_attn_implementation_internal"  # where a configuration keeps the name of its attention


def choose_in_copies(model: nn.Module, chosen: list[PreTrainedConfig], attention: str) -> None:
    """Give all modules of ``model`` copies of their configurations, with ``attention`` in those of the ``chosen``."""
    copied: dict[int, tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]] = {}

    def copy_of(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in copied:
            twin = copy.copy(config)
            copied[id(config)] = (config, twin, vars(config).copy())
            vars(twin).update({k: copy_of(v) for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)})
        return copied[id(config)][1]

    for module in model.modules():
        configs = {k: v for k, v in vars(module).items() if isinstance(v, PreTrainedConfig)}
        if configs:
            vars(module).update({k: copy_of(v) for k, v in configs.items()})
            vars(module)[_COPIED] = {k: copied[id(v)] for k, v in configs.items()}
    for config in chosen:
        vars(copy_of(config))[_CHOICE] = attention


def replaced_config(module: nn.Module) -> str | None:
    """An attribute of ``module`` that held one of our copies and no longer does."""
    copies = vars(module).get(_COPIED, {})
    return next((k for k, (_, twin, _) in copies.items() if vars(module).get(k) is not twin), None)


def restore_configs(module: nn.Module) -> None:
    """Put the configurations of ``module`` back, with what was changed in the copies meanwhile."""
    for attribute, (config, twin, before) in vars(module).pop(_COPIED, {}).items():
        for key, value in vars(twin).items():
            if key != _CHOICE and not isinstance(value, PreTrainedConfig) and value is not before.get(key, before):
                vars(config)[key] = value
        vars(module)[attribute] = config
