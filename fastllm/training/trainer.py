"""The steps of a training run: the same numbers, whatever the number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import console
from ..config import Config
from ..data import loader
from ..distributed.gradients import squared_norm_share, sum_whole_gradients
from ..distributed.mesh import Layout, fail
from ..distributed.parallelize import begin_pass
from ..hardware import peak_flops, peak_memory
from ..model.flops import flops_per_token
from ..model.gpt import GPT
from . import metrics, optim
from .checkpoint import Checkpoints, random_state, set_random_state
from .signals import StopSignals
from .spikes import Guard

IGNORED = -100  # the target of a token that does not count
SLOW = 0.5  # seconds of a step from which on the processes talk after each: a signal is heard at once


@dataclass
class Position:
    """Where a run is: with the tensors all that it goes on from."""

    step: int = 0  # optimizer steps taken
    sequence: int = 0  # sequences of the text read; a roll-back does not take them back
    progress: float = 0.0  # through the run, from 0 to 1
    seconds: float = 0.0  # of training; validating and saving are counted below
    validating: float = 0.0
    saving: float = 0.0
    logged_step: int = 0
    logged_seconds: float = 0.0
    spikes: int = 0
    rollbacks: int = 0
    validation_loss: float | None = None  # nats per token, the latest

    def tokens_per_second(self, batch_tokens: int) -> int:
        return round(self.step * batch_tokens / self.seconds) if self.seconds else 0


@dataclass(frozen=True)
class Text:
    """Token ids: what is trained on, and the held-out windows, int64 ``[windows, context]``."""

    tokens: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray


class Loop:
    """Trains ``model``, which is sharded as ``layout`` says, in the run folder ``out``."""

    def __init__(
        self, config: Config, layout: Layout, model: GPT, text: Text, device: torch.device, precision: torch.dtype,
        out: Path, stop: StopSignals,
    ) -> None:  # fmt: skip
        self.config, self.layout, self.model, self.text = config, layout, model, text
        self.device, self.out, self.stop = device, out, stop
        self.at = Position()
        self.batches = loader.Batches(text.tokens, config.model.context, config.train.seed)
        self.optimizers = optim.make_optimizers(model, config.optim)
        self.guard = Guard(config.guard, device)
        self.sums = torch.zeros(2, device=device)  # of the losses since the last line of the log; and how many
        self.norm = torch.zeros((), device=device)  # of the latest gradient
        self.lr = 0.0
        self.checkpoints = Checkpoints(out / "checkpoints", config.checkpoint.keep)
        self.ended_by = 0  # the signal that a process caught
        self.pace = 0.0  # progress of a step, where the run has an end in time
        self.share_of_peak = flops_per_token(config.model) / peak_flops(device, precision) / dist.get_world_size()

    # ---- a step ----

    def step(self) -> None:
        """Forward, backward and update. The host does not wait for the device."""
        at, config, model = self.at, self.config, self.model
        passes = list(self.passes(config.sequences, lambda row, n: self.batches.batch(at.sequence + row, n)))
        valid = self.batches.valid_tokens(at.sequence, config.sequences)
        total = torch.zeros((), device=self.device)
        for i, (inputs, targets) in enumerate(passes):
            begin_pass(model, config.parallel, last=i == len(passes) - 1)
            loss = model(inputs, targets, reduction="sum")
            loss.backward()
            total += loss.detach()
        sum_whole_gradients(model, self.layout)
        sums = torch.stack((total, squared_norm_share(model, self.layout)))
        dist.all_reduce(sums)
        # The gradients are those of the sum over all tokens: the update divides them, with what clipping asks for.
        loss, self.norm = sums[0] / valid, sums[1].sqrt() / valid
        spike = self.guard.step(at.step, loss, self.norm)
        self.lr = optim.learning_rate(config.optim, at.progress + 0.5 / config.train.steps)
        optim.step(self.optimizers, self.lr, divisor=(self.norm / config.optim.clip).clamp(min=1.0) * valid, skip=spike)
        self.sums += torch.stack((torch.where(spike > 0, 0.0, loss), 1.0 - spike))
        at.step += 1
        at.sequence += config.sequences
        at.progress = max(at.step / config.train.steps, at.progress + self.pace)

    def passes(
        self, count: int, fetch: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of ``count`` sequences, in micro-batches; ``fetch(first, n)`` reads them.

        All processes make as many passes: one that has nothing left gets a sequence that does not count.
        """
        rows, size = self.layout.rows(count), self.config.train.micro_batch
        for first in range(0, self.layout.most_rows(count), size):
            part = rows[first : first + size]
            if part:
                inputs, targets = map(torch.from_numpy, fetch(part.start, len(part)))
            else:
                inputs = torch.zeros(1, self.config.model.context, dtype=torch.int64)
                targets = torch.full_like(inputs, IGNORED)
            yield self._to_device(inputs), self._to_device(targets)

    def _to_device(self, tokens: Tensor) -> Tensor:
        tokens = self.layout.own_tokens(tokens)
        if self.device.type == "cpu":
            return tokens
        return tokens.contiguous().pin_memory().to(self.device, non_blocking=True)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Nats per token on the held-out windows."""
        inputs, targets = self.text.inputs, self.text.targets
        total = torch.zeros((), device=self.device)
        for part in self.passes(len(inputs), lambda row, n: (inputs[row : row + n], targets[row : row + n])):
            total += self.model(*part, reduction="sum")
        dist.all_reduce(total)
        return total.item() / targets.size

    # ---- the run ----

    def run(self) -> bool:
        """Train to the end, or until a signal is caught. Whether the last state has become a checkpoint."""
        at, settings = self.at, self.config.train
        first = dist.get_rank() == 0
        with metrics.Log(self.out, settings.steps, settings.tensorboard, first) as log, self._profiler() as profiler:
            self._start, began_at = time.perf_counter() - at.seconds, at.step
            if at.step == 0 and self.config.guard.policy == "rollback":
                self.save(log)
            while at.progress < 1 and not self.ended_by:
                self.step()
                profiler.step()
                end = at.progress >= 1
                logged, validated, saved = (
                    end or at.step % every == 0
                    for every in (settings.log_every, settings.eval_every, self.config.checkpoint.every)
                )
                alone = self.stop.caught and dist.get_world_size() == 1
                slow = at.step == began_at + 1 or at.seconds > SLOW * at.step
                if not (logged or validated or saved or alone or slow):
                    continue
                self.agree()
                if self.met_spike(log):
                    continue
                if logged:
                    self.log(log)
                if validated and not self.ended_by:
                    with self._counted("validating"):
                        at.validation_loss = self.evaluate()
                    log.validated(at.step, at.validation_loss)
                if saved:
                    self.save(log)
            if at.step not in self.checkpoints.begun:
                self.save(log)
            problem = self.checkpoints.wait()
        if problem:
            console.say("warning", problem)
        return not problem

    def agree(self) -> None:
        """Wait for the device, and let all processes know of signals, and of the time as the first one has it."""
        self.norm.item()
        first = dist.get_rank() == 0
        seconds = time.perf_counter() - self._start if first else 0.0
        shared = torch.tensor([self.stop.caught, seconds, peak_memory(self.device)], dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        self.ended_by, self.at.seconds, self.memory = int(shared[0]), float(shared[1]), int(shared[2])
        self.measure_progress()

    def measure_progress(self) -> None:
        """By the steps, or where there is a limit by the time, if that is further."""
        at, settings = self.at, self.config.train
        at.progress = at.step / settings.steps
        if settings.seconds and at.step:
            at.progress = max(at.progress, at.seconds / settings.seconds)
            self.pace = at.seconds / at.step / settings.seconds

    def log(self, log: metrics.Log) -> None:
        at, tokens = self.at, self.config.train.batch_tokens
        loss, count, norm = torch.cat((self.sums, self.norm[None])).tolist()
        speed = (at.step - at.logged_step) * tokens / max(at.seconds - at.logged_seconds, 1e-9)
        record = {
            "step": at.step,
            "tokens": at.step * tokens,
            "seconds": round(at.seconds, 2),
            "loss": loss / count if count else None,
            "lr": self.lr,
            "grad_norm": norm,
            "tokens_per_second": round(speed),
            "mfu": round(speed * self.share_of_peak, 4),
            "memory": self.memory,
        }
        log.trained(record, left=at.seconds * max(0.0, 1 / at.progress - 1))
        at.logged_step, at.logged_seconds = at.step, at.seconds
        self.sums.zero_()

    def met_spike(self, log: metrics.Log) -> bool:
        """Act on spikes since the last look. True: the run was rolled back."""
        at, config = self.at, self.config.guard
        count, recent, met, usual = self.guard.report()
        if count == at.spikes:
            return False
        at.spikes = count
        what = (
            f"loss {met[0]:.4g} and gradient norm {met[1]:.4g} before step {at.step}, where {usual[0]:.4g} and "
            f"{usual[1]:.4g} are usual"
        )
        log.write({"step": at.step, "spikes": count, "spike_loss": met[0], "spike_grad_norm": met[1]})
        if config.policy == "stop" or recent > config.limit or at.rollbacks >= config.limit:
            times = f"{recent} spikes within {config.window} steps" if recent > 1 else "a spike"
            times += f", after {at.rollbacks} roll-backs" if at.rollbacks else ""
            self.checkpoints.wait()
            saved = self.checkpoints.steps()
            fail(
                f"{times}: {what}. Try a lower --optim.lr or a longer --optim.warmup, or look at the text there. "
                + (f"The last checkpoint is of step {saved[-1]}" if saved else "There is no checkpoint yet")
            )
        if config.policy == "skip":
            console.say("spike", f"{what}: that update was left out")
            return False
        self.roll_back()
        console.say("spike", f"{what}: back to step {at.step}, and on with the text behind it")
        return True

    def roll_back(self) -> None:
        """To the last checkpoint; but what was read, met and spent stays so."""
        at = self.at
        flags = [tensor.clone() for tensor in (self.guard.count, self.guard.spikes)]
        kept = {n: getattr(at, n) for n in ("sequence", "seconds", "validating", "saving", "spikes")}
        kept |= {"rollbacks": at.rollbacks + 1, "logged_seconds": at.seconds}
        self.checkpoints.wait()
        before = time.perf_counter()
        self.restore()
        self._start += time.perf_counter() - before
        vars(at).update(kept)
        for tensor, value in zip((self.guard.count, self.guard.spikes), flags, strict=True):
            tensor.copy_(value)

    # ---- state ----

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name: the tensors themselves."""
        parts = {
            "model": self.model.state_dict(),
            "optim": optim.state_tensors(self.model, self.optimizers),
            "guard": self.guard.state(),
            "loop": {"sums": self.sums, "norm": self.norm},
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def save(self, log: metrics.Log) -> None:
        """Begin to write a checkpoint; what went wrong with the last one is told, and training goes on."""
        facts = {"position": asdict(self.at), "model": asdict(self.config.model)}
        with self._counted("saving"):
            tensors = self.tensors() | random_state(self.device)
            problem = self.checkpoints.save(self.at.step, tensors, facts)
        if problem:
            console.say("warning", f"{problem}; training goes on")
            log.write({"step": self.at.step, "problem": problem})

    def restore(self) -> None:
        """Go back to the last whole checkpoint."""
        tensors = self.tensors()
        for step in reversed(self.checkpoints.steps()):
            facts = self.checkpoints.facts(step)
            if facts["model"] != asdict(self.config.model):
                changed = [k for k, v in asdict(self.config.model).items() if facts["model"].get(k) != v]
                fail(f"the checkpoint of step {step} has another model.{', model.'.join(changed)}")
            own = random_state(self.device) if facts["processes"] == dist.get_world_size() else {}
            problem = self.checkpoints.load(step, tensors | own)
            if problem:
                console.say("warning", f"{problem}; the one before it is taken")
                continue
            if own:
                set_random_state(self.device, own)
            vars(self.at).update(facts["position"])
            self.measure_progress()
            return
        fail(f"there is no whole checkpoint in {self.checkpoints.folder}")

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        """Count the time of the block as ``what``, and not as training."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        setattr(self.at, what, getattr(self.at, what) + seconds)
        self._start += seconds

    def _profiler(self) -> Any:
        """Traces steps for chrome://tracing and Perfetto, as ``train.profile`` says."""
        steps = self.config.train.profile
        if not steps or dist.get_rank():
            return nullcontext(_Nothing())

        def done(profile: torch.profiler.profile) -> None:
            profile.export_chrome_trace(str(self.out / "trace.json.gz"))
            table = profile.key_averages().table(sort_by=f"self_{self.device.type}_time_total", row_limit=40)
            (self.out / "profile.txt").write_text(table)
            console.say("profile", f"{steps} steps: {self.out / 'trace.json.gz'}, {self.out / 'profile.txt'}")

        schedule = torch.profiler.schedule(skip_first=10, wait=0, warmup=2, active=steps, repeat=1)
        return torch.profiler.profile(schedule=schedule, on_trace_ready=done, record_shapes=True)


class _Nothing:
    def step(self) -> None:
        pass
