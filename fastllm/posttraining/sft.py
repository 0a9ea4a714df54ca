"""Supervised fine-tuning: the loss of the assistant's turns, and of what a teacher would have said there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import console
from ..data.loader import IGNORE_INDEX, Batch, EvaluationData, TrainingData
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
from .config import SftConfig, TeacherConfig
from .conversations import Conversation, read_conversations
from .datasets import encoded, finish, learnt, mixture_of, places_of, sources, weights_of
from .examples import ChatSequences, Examples, ExamplesBuilder
from .rendering import Encoded, encode_chat
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


def training_data(config: SftConfig, examples: Examples) -> TrainingData:
    """Packed sequences of the rows for training, by file where the files have weights."""
    rows, weights, seq_len = examples.split.train, weights_of(config.data), sequence_length(config)
    groups = [rows] if weights is None else [rows[examples.source[rows] == i] for i in range(len(weights))]
    sequences = [LearntChats(examples, g if len(g) else rows, seq_len, config.train.seed) for g in groups]
    identity = {"examples": examples.checksum, "seq_len": seq_len}
    return TrainingData(sequences, config.train.seed, mixture_of(config, weights), identity)
