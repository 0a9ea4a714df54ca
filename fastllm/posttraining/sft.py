"""Supervised fine-tuning: the loss of the assistant's turns, and of what a teacher would have said there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import console
from ..data.loader import IGNORE_INDEX, Batch, EvaluationData, TrainingData
from ..data.mixture import Mixture, parse_weights
from ..data.progress import progress
from ..data.tokenizer import Tokenizer
from ..distributed.mesh import ParallelDims, run_on_all_ranks
from ..distributed.parallelize import parallelize
from ..errors import UserError
from ..inference.load import load
from ..kernels import linear_cross_entropy, linear_jsd
from ..model.gpt import GPT
from ..training.evaluation import LossEvaluator
from ..training.objectives import Loss
from ..training.plot import Panel
from .config import ChatDataConfig, SftConfig, TeacherConfig
from .conversations import Conversation, read_conversations
from .examples import ChatSequences, Examples, ExamplesBuilder
from .rendering import Encoded, Refused, encode_chat
from .rows import Report
from .run import EXAMPLES, Context, Task, sequence_length

CUT = "cut at a turn: longer than the context"


class ChatLoss:
    """The negative log-likelihood of the targets that count, in nats; with a teacher, partly the divergence from it.

    The head is computed for these targets alone.
    """

    def __init__(self, dims: ParallelDims, config: TeacherConfig, teacher: GPT | None = None) -> None:
        self.dims, self.config, self.teacher = dims, config, teacher
        self.metric_names: tuple[str, ...] = () if teacher is None else ("cross_entropy", "divergence")

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        targets, chosen = batch["targets"], learnt(batch, self.dims)
        packing = {name: batch[name] for name in ("positions", "cu_seqlens")}
        count = (targets != IGNORE_INDEX).sum()
        picked = chosen(targets)
        if self.teacher is None:

            def head(hidden: Tensor, weight: Tensor) -> Tensor:
                return linear_cross_entropy(chosen(hidden), weight, picked, reduction="sum")

            return Loss(model(batch["tokens"], head=head, **packing), count)
        with torch.no_grad():
            teacher_hidden, teacher_weight = self.teacher(
                batch["tokens"], head=lambda hidden, weight: (chosen(hidden), weight), **packing
            )

        def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            rows = chosen(hidden)
            divergence = linear_jsd(
                rows, weight, teacher_hidden, teacher_weight, mask=picked != IGNORE_INDEX, beta=self.config.beta,
                temperature=self.config.temperature, reduction="sum",
            )  # fmt: skip
            return linear_cross_entropy(rows, weight, picked, reduction="sum"), divergence

        nll, divergence = model(batch["tokens"], head=both, **packing)
        loss = torch.lerp(nll, divergence, self.config.weight)
        return Loss(loss, count, {"cross_entropy": nll.detach(), "divergence": divergence.detach()})


def learnt(batch: Batch, dims: ParallelDims) -> Callable[[Tensor], Tensor]:
    """Picks of ``[items, tokens, …]`` the tokens whose targets count; all of them, where ranks share the sequences."""
    if dims.tp_size > 1 or "learnt" not in batch:
        return lambda x: x.flatten(0, 1)
    return lambda x: x.flatten(0, 1).index_select(0, batch["learnt"])


def places_of(batch: Batch) -> Batch:
    """``batch`` with "learnt": where the targets that count are among all, int64."""
    return batch | {"learnt": (batch["targets"].flatten() != IGNORE_INDEX).nonzero().flatten()}


class LearntChats(ChatSequences):
    """The same with the places of the targets that count."""

    def build(self, rows: Sequence[Any]) -> Batch:
        return places_of(super().build(rows))


class Sft:
    """``fastllm sft``."""

    name = "sft"
    panels: tuple[Panel, ...] = ()

    def prepare(self, config: SftConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
        report = Report()
        builder = ExamplesBuilder()
        max_tokens = sequence_length(config)
        for number, evaluated, path in sources(config.data):
            rows = read_conversations(path, report)
            for _, parts in encoded(rows, report, lambda c: [encode_conversation(tokenizer, c, report, max_tokens)]):
                for part in parts:
                    builder.add([part], number, evaluated=evaluated, of=parts)
        examples = finish(builder, report, config.data, folder)
        learnt_tokens = int(examples.trained.sum())
        console.say("learnt", f"{learnt_tokens:,} of {len(examples.tokens):,} tokens")
        data = training_data(config, examples)
        items = sum(source.packing.sequences for source in data.sources)
        share = learnt_tokens / len(examples.tokens)
        return {"items": items, "data": examples.checksum, "learnt_share": share, "report": report.as_dict()}

    def task(self, context: Context) -> Task:
        config = context.config
        examples = Examples.load(context.folder / EXAMPLES, context.metadata["data"])
        objective = ChatLoss(context.dims, config.teacher, teacher_of(context))
        evaluator = None
        if len(rows := examples.split.validation):
            sequences = LearntChats(examples, rows, sequence_length(config), 0)
            data = EvaluationData(sequences, 2**62)
            evaluator = LossEvaluator(objective, data, len(data), config.train.micro_batch)
        return Task(objective, training_data(config, examples), evaluator)

    def warnings(self, log: Path) -> list[str]:
        return []


def encode_conversation(
    tokenizer: Tokenizer, conversation: Conversation, report: Report, max_tokens: int
) -> list[Encoded]:
    found = encode_chat(tokenizer, conversation.messages, conversation.tools, max_tokens=max_tokens)
    if any(part.cut for part in found):
        report.note(conversation.where, CUT)
    return found


def teacher_of(context: Context) -> GPT | None:
    """The teacher, sharded as the model is."""
    config = context.config
    if not config.teacher.path:
        return None

    def loaded() -> GPT:
        teacher, tokenizer = load(config.teacher.path)
        if tokenizer.fingerprint != context.tokenizer.fingerprint:
            raise UserError(f"teacher.path: {config.teacher.path} has another tokenizer than the model")
        if teacher.config.vocab_size != context.model.config.vocab_size:
            raise UserError(
                f"teacher.path: {config.teacher.path} has {teacher.config.vocab_size} tokens, "
                f"the model {context.model.config.vocab_size}"
            )
        return teacher

    teacher = run_on_all_ranks(loaded).requires_grad_(False).float()
    parallelize(teacher, config.parallel, context.dims, context.precision)
    return teacher.to(context.device).eval()


# ---- data, for all methods ----


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


def training_data(config: SftConfig, examples: Examples) -> TrainingData:
    """Packed sequences of the rows for training, by file where the files have weights."""
    rows, weights, seq_len = examples.split.train, weights_of(config.data), sequence_length(config)
    groups = [rows] if weights is None else [rows[examples.source[rows] == i] for i in range(len(weights))]
    sequences = [LearntChats(examples, g if len(g) else rows, seq_len, config.train.seed) for g in groups]
    identity = {"examples": examples.checksum, "seq_len": seq_len}
    return TrainingData(sequences, config.train.seed, mixture_of(config, weights), identity)
