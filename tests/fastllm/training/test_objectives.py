"""The trainer takes any objective over any data source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm.data.loader import IGNORE_INDEX, Batch
from fastllm.distributed.mesh import ParallelDims, process_group
from fastllm.distributed.parallelize import build_model
from fastllm.errors import UserError
from fastllm.training.metrics import read_log
from fastllm.training.objectives import Loss
from fastllm.training.signals import StopSignals
from fastllm.training.trainer import Trainer
from tests.fastllm import ranks, small_run


class Preference:
    """A preference loss without a reference model: -log sigmoid of the difference of two mean log-likelihoods."""

    metric_names = ("accuracy", "margin")

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        chosen, rejected = (self._log_prob(model, batch[name]) for name in ("chosen", "rejected"))
        margin = (chosen - rejected) * batch["counts"]
        loss = -F.logsigmoid(margin) * batch["counts"]
        accuracy = (margin > 0).float()
        return Loss(loss.sum(), batch["counts"].sum(), {"accuracy": accuracy.sum(), "margin": margin.detach().sum()})

    @staticmethod
    def _log_prob(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return -F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)


class Pairs:
    """Pairs that a model can tell apart: the chosen one counts up, the rejected one down."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def batch(self, index: int, n: int) -> Batch:
        starts = [torch.Generator().manual_seed(self.seed * 10_007 + i) for i in range(index, index + n)]
        first = torch.stack([torch.randint(100, 150, (1,), generator=g) for g in starts])
        steps = torch.arange(16)
        return {"chosen": first + steps, "rejected": first - steps, "counts": torch.ones(n)}

    def padding(self) -> Batch:
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        return {"chosen": tokens, "rejected": tokens, "counts": torch.zeros(1)}

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state != self.state_dict():
            raise UserError(f"the checkpoint was trained on pairs of seed {state['seed']}, this is seed {self.seed}")


def make(out: Path, seed: int = 0, **options: Any) -> Trainer:
    out.mkdir(exist_ok=True)
    config = small_run.config(steps=8, lr=5e-3, every=4, **options)
    dims = ParallelDims.from_config(config.parallel, "cpu")
    where = {"run_dir": out, "device": small_run.CPU, "precision": torch.float32, "signals": StopSignals()}
    model = build_model(config, dims, torch.float32, small_run.CPU)
    return Trainer(config, dims, model, Preference(), Pairs(seed), None, **where)


def log_of(out: Path) -> list[tuple[float, ...]]:
    names = ("loss", "accuracy", "margin", "grad_norm")
    return [tuple(record[name] for name in names) for record in read_log(out / "log.jsonl")]


def run_pairs(rank: int, out: str) -> None:
    with process_group(small_run.CPU):
        make(Path(out)).run()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "run"
    with process_group(small_run.CPU):
        make(out).run()
    return out


def test_another_objective_learns_and_logs_its_metrics(trained):
    lines = log_of(trained)
    assert len(lines) == 8
    assert lines[-1][0] < lines[0][0] - 0.1
    assert lines[-1][1] == 1.0  # every pair is told apart
    assert lines[-1][2] > lines[0][2]


def test_on_two_ranks_it_is_the_same(trained, tmp_path):
    """5 pairs a step: a rank has 2, the other 3, and in one micro-batch none."""
    ranks.run(2, run_pairs, str(tmp_path / "run"))
    torch.testing.assert_close(torch.tensor(log_of(tmp_path / "run")), torch.tensor(log_of(trained)), rtol=1e-5, atol=0)


def test_it_resumes_bitwise_and_only_on_its_own_data(trained, tmp_path):
    import shutil

    with process_group(small_run.CPU):
        trainer = make(tmp_path / "again")
        shutil.copytree(trained / "checkpoints" / "step-00000004", tmp_path / "again/checkpoints/step-00000004")
        trainer.restore()
        assert trainer.state.items == 20
        trainer.run()
        assert log_of(tmp_path / "again") == log_of(trained)[4:]
        with pytest.raises(UserError, match="pairs of seed 0, this is seed 1"):
            make(tmp_path / "again", seed=1).restore()


def test_without_an_evaluator_there_is_no_validation_loss(trained):
    assert all("validation_loss" not in record for record in read_log(trained / "log.jsonl"))


def test_a_batch_that_counts_nothing_changes_no_weight_by_its_gradient(tmp_path):
    """All targets ignored: the loss is 0, not NaN, and no spike is met."""
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(weight_decay=0.0), tmp_path)
        tokens = torch.zeros(5, 16, dtype=torch.int64)
        trainer.data.batch = lambda index, n: {
            "tokens": tokens[:n],
            "targets": torch.full((n, 16), IGNORE_INDEX),
        }
        before = {name: p.detach().clone() for name, p in trainer.model.state_dict().items()}
        trainer.train_step()
        assert trainer.metrics.pop()["loss"] == 0.0
        assert trainer.spikes.report().count == 0
        assert all(torch.equal(before[name], p) for name, p in trainer.model.state_dict().items())
