"""The trainer: minimises any objective over any data source, with the same numbers on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .. import console
from ..config import CheckpointConfig, LoopConfig, ModelConfig, OptimConfig, ParallelConfig, SpikeConfig
from ..data.loader import Batch, DataSource
from ..distributed.gradients import all_reduce_replicated_grads, local_grad_norm_sq
from ..distributed.mesh import ParallelDims, abort_all_ranks
from ..distributed.parallelize import begin_micro_batch
from ..errors import UserError
from ..hardware import peak_flops, peak_memory
from ..model.flops import flops_per_token
from ..model.gpt import GPT
from . import optim
from .checkpoint import Checkpointer, DamagedCheckpoint, rng_state, set_rng_state
from .evaluation import Evaluator
from .metrics import MeanMetrics, RunLog
from .micro_batches import micro_batches, pinned, to_device
from .objectives import Objective, StepObjective, means
from .prefetch import Prefetcher
from .profiler import StepProfiler
from .signals import StopSignals
from .spikes import SpikeDetector
from .state import Stopwatch, TrainState, is_state
from .task_evaluation import TaskEvaluation

SYNC_EVERY = 2.0  # seconds, about, after which the ranks synchronise: torchrun waits 30 s for what a signal begins


class TrainerConfig(Protocol):
    """What the trainer reads of a run's configuration."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def train(self) -> LoopConfig: ...
    @property
    def spikes(self) -> SpikeConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def items_per_step(self) -> int: ...


class Trainer:
    """Trains a sharded model; the parts that a run is made of are attributes, each with a small interface.

    Args:
        config: of the run.
        dims: how the model is sharded.
        model: as :func:`fastllm.distributed.parallelize.build_model` returns it. Parameters that require no gradient
            stay as they are, and are not in checkpoints.
        objective: what is minimised.
        data: what is trained on.
        evaluator: computes the validation loss every ``train.eval_every`` steps; None: there is none.
        run_dir: where checkpoints, the log and traces go.
        device: of this rank.
        precision: in which the model computes.
        signals: those that end the run early.
        evaluate_first: evaluate before the first step too.
        tasks: what else the model is asked meanwhile, from the first step on.
    """

    def __init__(
        self,
        config: TrainerConfig,
        dims: ParallelDims,
        model: GPT,
        objective: Objective,
        data: DataSource,
        evaluator: Evaluator | None,
        *,
        run_dir: Path,
        device: torch.device,
        precision: torch.dtype,
        signals: StopSignals,
        evaluate_first: bool = False,
        tasks: TaskEvaluation | None = None,
    ) -> None:
        self.config, self.dims, self.model = config, dims, model
        self.objective, self.data, self.evaluator = objective, data, evaluator
        self.device, self.signals, self.evaluate_first = device, signals, evaluate_first
        self.tasks = tasks
        self.state = TrainState()
        self.stopwatch = Stopwatch(self.state)
        self.optimizers = optim.make_optimizers(model, config.optim)
        self.spikes = SpikeDetector(config.spikes, device)
        self.metrics = MeanMetrics(objective.metric_names, device)
        self.checkpoints = Checkpointer(run_dir / "checkpoints", config.checkpoint.keep)
        self.log = RunLog(run_dir, config.train.steps, config.train.tensorboard, enabled=dist.get_rank() == 0)
        self.profiler = StepProfiler(run_dir, config.train.profile, device)
        self.batches = Prefetcher(self._read, config.items_per_step)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)  # trained on and not yet in state.tokens
        self.stopped_by = 0  # the number of the signal that any rank caught
        self.lr = 0.0
        self.memory = 0  # bytes, the most of any rank
        self._progress_per_step = 0.0  # where the run is limited in time
        self.mfu_per_token = flops_per_token(config.model) / peak_flops(device, precision) / dist.get_world_size()

    # ---- a step ----

    def train_step(self) -> None:
        """Forward, backward and update. The host does not wait for the device."""
        state, config, names = self.state, self.config, self.objective.metric_names
        batches = self.batches.get(state.items)
        if isinstance(self.objective, StepObjective):
            batches = [to_device(batch, self.device) for batch in batches]
            batches = self.objective.begin_step(self.model, state.step, state.items, batches)
        sums = torch.zeros(3 + 2 * len(names), device=self.device)
        for i, batch in enumerate(batches):
            begin_micro_batch(self.model, config.parallel, last=i == len(batches) - 1)
            found = self.objective(self.model, to_device(batch, self.device))
            found.loss_sum.backward()
            sums += found.sums(names, sums.dtype)
        all_reduce_replicated_grads(self.model, self.dims)
        sums = torch.cat((sums, local_grad_norm_sq(self.model, self.dims)[None]))
        dist.all_reduce(sums)
        loss_sum, count, tokens, *_, norm_sq = sums
        self.tokens += tokens.to(torch.int64)
        # Gradients are those of the sum over all items: the update divides them, together with what clipping asks for.
        count = count.clamp(min=1.0)
        loss, grad_norm = loss_sum / count, norm_sq.sqrt() / count
        found_inf = self.spikes.step(state.step, loss, grad_norm)
        self.lr = optim.learning_rate(config.optim, state.progress + 0.5 / config.train.steps)
        grad_scale = (grad_norm / config.optim.max_grad_norm).clamp(min=1.0) * count
        optim.step(self.optimizers, self.lr, grad_scale=grad_scale, found_inf=found_inf)
        self.metrics.add(loss, means(sums[3:-1]), grad_norm)
        state.step += 1
        state.items += config.items_per_step
        state.progress = max(state.step / config.train.steps, state.progress + self._progress_per_step)

    def _read(self, index: int) -> list[Batch]:
        """The micro-batches of the step that begins with item ``index``."""
        found = micro_batches(self.data, index, self.config.items_per_step, self.config.train.micro_batch, self.dims)
        if self.device.type != "cuda":
            return list(found)
        torch.cuda.set_device(self.device)  # in each thread
        return [pinned(batch) for batch in found]

    # ---- the run ----

    def run(self) -> bool:
        """Train to the end, or until a signal is caught. Returns whether the last state has become a checkpoint."""
        state, settings = self.state, self.config.train
        with self.log, self.profiler, self.batches:
            self.stopwatch.start()
            first_step, synced = state.step, state.step
            if state.step == 0 and self.config.spikes.policy == "rollback":
                self.save()
            # Resumed after its last step: what it has not come to is the end.
            if state.progress >= 1 or (self.evaluate_first and not state.step):
                self.evaluate()
            if self.tasks and (state.progress >= 1 or not state.step):
                self.evaluate_tasks(self.tasks)
            while state.progress < 1 and not self.stopped_by:
                self.train_step()
                self.profiler.step()
                signalled = self.signals.caught and dist.get_world_size() == 1
                sync_due = (state.step - synced) * state.seconds > SYNC_EVERY * synced
                all_due = [settings.log_every, settings.eval_every, self.config.checkpoint.every]
                all_due += [self.tasks.every] if self.tasks else []
                if not (any(map(self.due, all_due)) or signalled or sync_due or state.step == first_step + 1):
                    continue
                self.sync_ranks()  # which may find that the time is up
                rolled_back, synced = self.handle_spikes(), state.step
                if rolled_back:
                    continue
                if self.due(settings.log_every):
                    self.write_log()
                if self.due(settings.eval_every) and not self.stopped_by:
                    self.evaluate()
                if self.tasks and self.due(self.tasks.every) and not self.stopped_by:
                    self.evaluate_tasks(self.tasks)
                if self.due(self.config.checkpoint.every):
                    self.save()
            if state.step not in self.checkpoints.begun:
                self.save()
            problem = self.checkpoints.wait()
        if problem:
            console.say("warning", problem)
        return not problem

    def due(self, every: int) -> bool:
        """Whether it is time for what is done every so many steps and at the end."""
        return self.state.progress >= 1 or self.state.step % every == 0

    def sync_ranks(self) -> None:
        """Wait for the device; share signals, rank 0's time and the peak memory among all ranks."""
        self.state.tokens += int(self.tokens)  # waits for the device
        self.tokens.zero_()
        seconds = self.stopwatch.seconds() if dist.get_rank() == 0 else 0.0
        shared = torch.tensor([self.signals.caught, seconds, peak_memory(self.device)], dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        self.stopped_by, self.state.seconds, self.memory = int(shared[0]), float(shared[1]), int(shared[2])
        self._update_progress()

    def _update_progress(self) -> None:
        """By steps or, where there is a time limit, by time, whichever is further."""
        state, settings = self.state, self.config.train
        state.progress = state.step / settings.steps
        if settings.seconds and state.step:
            state.progress = max(state.progress, state.seconds / settings.seconds)
            self._progress_per_step = state.seconds / state.step / settings.seconds

    def write_log(self) -> None:
        """A line of the log: the means since the last one."""
        state = self.state
        speed = (state.tokens - state.logged_tokens) / max(state.seconds - state.logged_seconds, 1e-9)
        means = self.metrics.pop()
        record = {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 2),
            "loss": means.pop("loss"),
            "lr": self.lr,
            "grad_norm": means.pop("grad_norm"),
            "tokens_per_second": round(speed),
            "mfu": round(speed * self.mfu_per_token, 4),
            "memory": self.memory,
            **means,
        }
        self.log.trained(record, seconds_left=state.seconds * max(0.0, 1 / state.progress - 1))
        state.logged_tokens, state.logged_seconds = state.tokens, state.seconds

    def evaluate(self) -> None:
        """The validation loss, into the state and, with the objective's metrics, the log."""
        if self.evaluator is None:
            return
        with self.stopwatch.counted_as("seconds_evaluating"):
            loss, metrics = self.evaluator.evaluate(self.model, self.dims, self.device)
        self.state.validation_loss = loss
        self.log.validated(self.state.step, loss, metrics)

    def evaluate_tasks(self, tasks: TaskEvaluation) -> None:
        """The metrics of the run's tasks, into the log."""
        with self.stopwatch.counted_as("seconds_evaluating"):
            found = tasks.evaluate(self.model)
        self.log.asked(self.state.step, found)

    # ---- spikes ----

    def handle_spikes(self) -> bool:
        """Report spikes since the last call and act as ``spikes.policy`` says. True: the run was rolled back."""
        state, config = self.state, self.config.spikes
        found = self.spikes.report()
        if found.count == state.spikes:
            return False
        state.spikes = found.count
        what = f"{found.describe()} before step {state.step}"
        self.log.write(
            {"step": state.step, "spikes": found.count, "spike_loss": found.loss, "spike_grad_norm": found.grad_norm}
        )
        if config.policy == "stop" or found.recent > config.limit or state.rollbacks >= config.limit:
            times = f"{found.recent} spikes within {config.window} steps" if found.recent > 1 else "a spike"
            times += f", after {state.rollbacks} rollbacks" if state.rollbacks else ""
            self.checkpoints.wait()
            saved = self.checkpoints.steps()
            abort_all_ranks(
                f"{times}: {what}. Lower --optim.lr or raise --optim.warmup-ratio, or look at the data there. "
                + (f"The last checkpoint is of step {saved[-1]}" if saved else "There is no checkpoint yet")
            )
        if config.policy == "skip":
            console.say("spike", f"{what}: that update was skipped")
            return False
        self.roll_back()
        console.say("spike", f"{what}: back to step {state.step}, continuing with the data after it")
        return True

    def roll_back(self) -> None:
        """Restore the last checkpoint; but data read, spikes met and time spent are not taken back."""
        state = self.state
        names = ("items", "seconds", "seconds_evaluating", "seconds_saving", "spikes")
        kept = {name: getattr(state, name) for name in names}
        kept |= {"rollbacks": state.rollbacks + 1, "logged_seconds": state.seconds}
        self.checkpoints.wait()
        with self.stopwatch.counted_as(None), self.spikes.keep_counts():
            if self.restore() is None:
                abort_all_ranks(f"can't roll back: there is no intact checkpoint in {self.checkpoints.folder}")
        vars(state).update(kept)

    # ---- checkpoints ----

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name: the tensors themselves."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        parts = {
            "model": {name: tensor for name, tensor in self.model.state_dict().items() if name in trained},
            "optim": optim.state_tensors(self.model, self.optimizers),
            "spikes": self.spikes.state_dict(),
            "metrics": self.metrics.state_dict(),
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def save(self) -> None:
        """Begin to write a checkpoint. If the one before it failed, say so and continue."""
        metadata = {
            "state": asdict(self.state),
            "data": self.data.state_dict(),
            "model": asdict(self.config.model),
        }
        with self.stopwatch.counted_as("seconds_saving"):
            tensors = self.tensors() | rng_state(self.device)
            problem = self.checkpoints.save(self.state.step, tensors, metadata)
        if problem:
            console.say("warning", f"{problem}; training continues")
            self.log.write({"step": self.state.step, "problem": problem})

    def restore(self) -> int | None:
        """Continue from the last intact checkpoint. Returns its step; None: there is none, and nothing has changed.

        Raises UserError where the checkpoint is of another model or other data, or of another version.
        """
        for step in reversed(self.checkpoints.steps()):
            try:
                manifest = self.checkpoints.manifest(step)
                self._check_same_run(step, manifest)
                tensors = self.tensors()
                own = rng_state(self.device) if manifest["world_size"] == dist.get_world_size() else {}
                self.checkpoints.load(manifest, tensors | own)
            except DamagedCheckpoint as damage:
                console.say("warning", f"{damage}; using the one before it")
                continue
            if own:
                set_rng_state(self.device, own)
            self.restore_state(manifest["state"])
            return step
        return None

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state``, of a checkpoint or of final weights, says."""
        vars(self.state).update(state)
        self._update_progress()

    def _check_same_run(self, step: int, manifest: dict[str, Any]) -> None:
        state, others = manifest.get("state"), [manifest.get(key) for key in ("data", "model")]
        known = "world_size" in manifest and all(isinstance(part, dict) for part in others)
        if not known or not is_state(state) or state["step"] != step:
            abort_all_ranks(f"the checkpoint of step {step} was written by another version of fastllm")
        model = asdict(self.config.model)
        changed = [key for key, value in model.items() if manifest["model"].get(key) != value]
        if changed:
            abort_all_ranks(f"the checkpoint of step {step} has another model.{', model.'.join(changed)}")
        try:
            self.data.load_state_dict(manifest["data"])
        except UserError as error:
            abort_all_ranks(f"step {step}: {error}")
