"""Where a run is, and how it spent its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeGuard


@dataclass
class TrainState:
    """With the tensors, all that a resumed run continues from. Times are in seconds."""

    step: int = 0  # optimizer steps taken
    items: int = 0  # items of the data source read; a rollback does not take them back
    tokens: int = 0  # that were targets (what the objective counts), in the steps taken
    progress: float = 0.0  # through the run, from 0 to 1
    seconds: float = 0.0  # of training; evaluation and checkpoints are counted below
    seconds_evaluating: float = 0.0
    seconds_saving: float = 0.0
    logged_tokens: int = 0
    logged_seconds: float = 0.0
    spikes: int = 0
    rollbacks: int = 0
    validation_loss: float | None = None  # nats per token, the latest

    def tokens_per_second(self) -> int:
        """Over the whole run."""
        return round(self.tokens / self.seconds) if self.seconds else 0


def is_state(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether ``value``, from a file, is a TrainState as a dictionary: all of its fields, with numbers that can be."""
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(TrainState)}:
        return False
    loss = value["validation_loss"]  # NaN where training diverged
    if loss is not None and type(loss) is not float:
        return False
    return all(
        type(value[field.name]) in (int, type(field.default)) and 0 <= value[field.name] < 2**63
        for field in fields(TrainState)
        if field.default is not None
    )


class Stopwatch:
    """Measures ``state.seconds``, the time spent training, without what is counted elsewhere."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self._start = 0.0

    def start(self) -> None:
        """Continue from the seconds in the state."""
        self._start = time.perf_counter() - self.state.seconds

    def seconds(self) -> float:
        """Of training until now, on this rank."""
        return time.perf_counter() - self._start

    @contextmanager
    def counted_as(self, name: str | None) -> Iterator[None]:
        """Add the time of the block to the state's field ``name`` (None: to none), and not to training."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._start += seconds
        if name is not None:
            setattr(self.state, name, getattr(self.state, name) + seconds)
