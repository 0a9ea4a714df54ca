"""Tasks of ``fastllm eval`` that the model is asked while it is trained."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from .. import console
from ..config import LoopConfig, ModelConfig
from ..data.tokenizer import Tokenizer
from ..distributed.mesh import run_on_all_ranks
from ..errors import UserError
from ..evaluation import GPTModel, Options, Prepared, Sample, ask, find_tasks, prepare
from ..evaluation.rows import installed_data
from .inference_model import Merge, inference_model
from .metrics import TASK_PREFIX


class TaskEvaluation:
    """Asks the model a run's tasks every so many steps; each rank asks its share of the questions.

    Args:
        tasks: with their items.
        model_config: of the model.
        tokenizer: of the model.
        precision: in which it computes.
        every: steps between evaluations.
        merge: see :func:`fastllm.training.inference_model.inference_model`.
    """

    def __init__(
        self,
        tasks: list[Prepared],
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        precision: torch.dtype,
        every: int,
        merge: Merge | None = None,
    ) -> None:
        self.tasks, self.tokenizer, self.every = tasks, tokenizer, every
        self._whole = partial(inference_model, config=model_config, precision=precision, merge=merge)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The mean of each metric, by its name in the log; NaN where the model's logits are not finite.

        All ranks call this together.
        """
        gpt = GPTModel(self._whole(model), self.tokenizer)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        names, sums = [], []
        for task in self.tasks:
            own = Prepared(task.task, task.split, task.items[rank::ranks], task.rows)
            samples = self._samples(gpt, own)
            for metric in task.task.metrics:
                names.append(f"{TASK_PREFIX}{task.task.name}.{metric}")
                right = math.nan if samples is None else sum(sample.metrics[metric] for sample in samples)
                sums += [right, len(own.items)]
        totals = torch.tensor(sums, dtype=torch.float64, device=gpt.gpt.head_weight.device)
        dist.all_reduce(totals)
        values = (totals[0::2] / totals[1::2]).tolist()
        return dict(zip(names, values, strict=True))

    def _samples(self, model: GPTModel, own: Prepared) -> list[Sample] | None:
        try:
            with console.quietly():
                return ask(model, own)
        except UserError:  # of logits; training has its own remedies
            return None


def task_evaluation(
    settings: LoopConfig, model: ModelConfig, tokenizer: Tokenizer, precision: torch.dtype, merge: Merge | None = None
) -> TaskEvaluation | None:
    """What ``train.eval_tasks`` asks for, on every rank; None: nothing.

    Raises:
        UserError: there is no such task, or its rows can't be used.
    """
    if not settings.eval_tasks:
        return None

    def items() -> list[Prepared]:
        data = Path(settings.eval_tasks_data) if settings.eval_tasks_data else installed_data()
        found = []
        for task in find_tasks(settings.eval_tasks):
            limit = -(-settings.eval_tasks_limit // len(task.groups)) or None
            options = Options(limit=limit, too_long="truncate")
            found.append(prepare(task, data, tokenizer, model.max_seq_len, options))
        return found

    every = settings.eval_tasks_every or settings.eval_every
    return TaskEvaluation(run_on_all_ranks(items), model, tokenizer, precision, every, merge)
