"""The data of all methods: files of rows to examples, weights of the files, and the targets that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import console
from ..data.loader import IGNORE_INDEX, Batch
from ..data.mixture import Mixture, parse_weights
from ..data.progress import progress
from ..distributed.mesh import ParallelDims
from ..errors import UserError
from .config import ChatDataConfig
from .examples import Examples, ExamplesBuilder
from .rendering import Refused
from .rows import Report
from .run import EXAMPLES


def sources(config: ChatDataConfig) -> Iterator[tuple[int, bool, str]]:
    """The files to read: a number for each, whether it is for evaluation, and its path."""
    if not config.paths:
        raise UserError("there is no data: give files with --data")
    weights_of(config)  # before the files are read
    for number, path in enumerate(config.paths):
        yield number, False, path
    for path in config.eval_paths:
        yield 0, True, path


def encoded(rows: Iterator[Any], report: Report, encode: Callable[[Any], list[Any]]) -> Iterator[tuple[Any, Any]]:
    """Each row with each of the sequences that ``encode`` makes of it; those that are refused go to the report."""
    with progress("encode", 0) as bar:
        for row in rows:
            try:
                found = encode(row)
            except Refused as refusal:
                report.drop(row.where, refusal.reason, refusal.detail)
                continue
            report.keep()
            bar.advance(1)
            yield from ((row, part) for part in found)


def finish(
    builder: ExamplesBuilder,
    report: Report,
    config: ChatDataConfig,
    folder: Path,
    extra: dict[str, np.ndarray] | None = None,
) -> Examples:
    """The examples, saved into the run folder; says what was read and dropped."""
    report.require_any([*config.paths, *config.eval_paths])
    for line in report.lines():
        console.say("data", line)
    examples = builder.build(0.0 if config.eval_paths else config.validation)
    train, validation = examples.split
    if not len(train):
        raise UserError(f"{', '.join(config.paths)}: nothing is left to train on")
    if config.eval_paths and not len(validation):
        raise UserError(f"{', '.join(config.eval_paths)}: nothing is left to evaluate on")
    for number, (path, weight) in enumerate(zip(config.paths, weights_of(config) or (), strict=False)):
        if weight and not (examples.source[train] == number).any():
            raise UserError(f"data.weights: nothing of {path} is left to train on")
    examples.extra = extra or {}
    examples.save(folder / EXAMPLES)
    console.say("rows", f"{len(train):,} for training, {len(validation):,} for validation")
    return examples


def weights_of(config: ChatDataConfig) -> list[float] | None:
    """The weight of each file; None: every row counts alike."""
    if not config.weights:
        return None
    names = [Path(path).name for path in config.paths]
    if len(set(names)) < len(names):
        raise UserError("data.weights: two files have the same name; rename one")
    return parse_weights("data.weights", config.weights, names)


def mixture_of(config: Any, weights: list[float] | None) -> Mixture | None:
    return None if weights is None else Mixture(weights, config.train.seed)


def learnt(batch: Batch, dims: ParallelDims) -> Callable[[Tensor], Tensor]:
    """Picks of ``[items, tokens, …]`` the tokens whose targets count; all of them, where ranks share the sequences."""
    if dims.tp_size > 1 or "learnt" not in batch:
        return lambda x: x.flatten(0, 1)
    return lambda x: x.flatten(0, 1).index_select(0, batch["learnt"])


def places_of(batch: Batch) -> Batch:
    """``batch`` with "learnt": where the targets that count are among all, int64."""
    return batch | {"learnt": (batch["targets"].flatten() != IGNORE_INDEX).nonzero().flatten()}
