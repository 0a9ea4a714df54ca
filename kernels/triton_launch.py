"""What Triton launches share: the current device, and how many programs fill it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_processors: dict[torch.device, int] = {}


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Makes the device of ``x`` the current one: Triton launches there."""
    if x.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(x.device).device(x.device)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter few, so that tests reach the many-rows-per-program path."""
    if device.type == "cpu":
        return 2
    if device not in _processors:
        properties = torch.get_device_module(device).get_device_properties(device)
        _processors[device] = getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count
    return _processors[device]
