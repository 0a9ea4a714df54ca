"""Training: from text to a run folder. One loop for the CPU and a GPU, with FSDP2 at one rank as at many."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from . import __version__, checkpoint, data, optim, report
from . import config as configs
from .config import Config
from .errors import UserError
from .files import write_atomic
from .generate import generate
from .kernels.native import multiplies_bfloat16
from .model import GPT, count_parameters
from .tokenizer import Tokenizer
from .weights import save_weights


def train(config: Config, out: Path | None = None) -> int:
    """Train as ``config`` says, into the run folder ``out`` (None: a new one under runs/). Returns the exit code."""
    began = time.perf_counter()
    if out is not None:
        check_free(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    precision = pick_precision(config.train.precision, device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32

    corpus = data.load_corpus(config.data.paths, config.data.validation)
    report.say("text", f"{corpus.name}: {len(corpus.train)} documents, {corpus.size / 1e6:.1f}M characters")
    for note in corpus.notes:
        report.say("", note)
    tokenizer = Tokenizer.train(corpus.train, config.model.vocab_size)
    config = replace(
        config,
        model=replace(config.model, vocab_size=tokenizer.vocab_size),
        data=replace(config.data, paths=tuple(str(Path(p).resolve()) for p in config.data.paths)),
    )
    tokens, validation = (data.encode(tokenizer, part) for part in (corpus.train, corpus.validation))
    for name, part in (("train on", tokens), ("hold out", validation)):
        if len(part) <= config.model.context:
            raise UserError(
                f"too little text: {len(part)} tokens to {name}, at least {config.model.context + 1} are needed; "
                "give more text or lower --model.context"
            )
    held_out = HeldOut.of(config, tokenizer, tokens, validation)
    report.say(
        "tokenizer", f"{tokenizer.vocab_size:,} tokens; {len(tokens):,} to train on, {len(validation):,} held out"
    )

    out = claim(out)
    write_atomic(out / checkpoint.CONFIG, configs.dump(config).encode())
    tokenizer.save(out / checkpoint.TOKENIZER)
    meta: dict[str, Any] = {
        "status": "training",
        "step": 0,
        "steps": config.train.steps,
        "parameters": count_parameters(config.model)["total"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(precision).removeprefix("torch."),
        "fastllm": __version__,
        "torch": torch.__version__,
    }
    checkpoint.save_meta(out, meta)
    report.say("model", f"{meta['parameters'] / 1e6:.1f}M parameters, {meta['precision']} on {meta['device']}")

    with process_group(device), StopSignals() as stop:
        model = shard(GPT(config.model, config.train.seed).to(device), precision, device)
        result = run_loop(model, config, tokens, held_out, device, stop, out / "log.jsonl")
        save_weights(out / checkpoint.WEIGHTS, full_state(model))
    meta |= {"status": "interrupted" if stop.caught else "finished", **dataclasses.asdict(result)}
    meta |= {"unigram_loss": held_out.unigram_loss, "seconds": round(time.perf_counter() - began, 1)}
    checkpoint.save_meta(out, meta)
    report.plot(out / "log.jsonl", out / "loss.png", held_out.unigram_loss)

    prompt = "" if config.data.paths else "def "
    if stop.caught:
        report.say("interrupted", f"after step {result.step} of {config.train.steps}; the weights so far are saved")
    else:
        sample = prompt + "".join(generate(*checkpoint.load_run(out, device)[:2], prompt, max_tokens=120))
        write_atomic(out / "sample.txt", sample.encode())
        report.say("sample", sample)
        loss, per_byte = result.validation_loss, math.log(2) * held_out.bytes_per_token
        report.say("validation", f"loss {loss:.3f} nats per token ({loss / per_byte:.3f} bits per byte)")
        report.say("", f"     {held_out.unigram_loss:.3f} a unigram model of the same tokens")
        report.say("speed", f"{result.tokens_per_second:,.0f} tokens/s; {time.perf_counter() - began:.0f} s in all")
    report.say("files", f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    report.say("try", f"fastllm generate {out}" + (f' --prompt "{prompt}"' if prompt else ""))
    return 128 + stop.caught if stop.caught else 0


def run_loop(
    model: GPT,
    config: Config,
    tokens: np.ndarray,
    held_out: HeldOut,
    device: torch.device,
    stop: StopSignals,
    log: Path,
) -> Result:
    """The steps. ``tokens`` is the text to train on; a JSON line is added to ``log`` for each logged step."""
    settings = config.train
    sequences = settings.batch_tokens // config.model.context
    batches = data.Batches(tokens, config.model.context, settings.seed)
    optimizers = optim.make_optimizers(model, config.optim)
    start = logged_at = time.perf_counter()
    evaluating = 0.0  # seconds, left out of the speed
    step, logged_step, loss_sum = 0, 0, torch.zeros((), device=device)
    progress, validation_loss = 0.0, None

    with report.Progress(settings.steps) as display, open_log(log) as write:
        while progress < 1 and not stop.caught:
            lr = optim.learning_rate(config.optim, progress + 0.5 / settings.steps)
            for first in range(0, sequences, settings.micro_batch):
                count = min(settings.micro_batch, sequences - first)
                model.set_requires_gradient_sync(first + count == sequences)
                inputs, targets = to_device(batches.batch(step * sequences + first, count), device)
                loss = model(inputs, targets) * (count / sequences)
                loss.backward()
                loss_sum += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            optim.step(optimizers, lr)
            step += 1
            progress = step / settings.steps
            if settings.seconds:
                progress = max(progress, (time.perf_counter() - start) / settings.seconds)

            if step % settings.log_every == 0 or progress >= 1:  # only here the host waits for the device
                train_loss, norm = loss_sum.item() / (step - logged_step), full(norm).item()
                if not (math.isfinite(train_loss) and math.isfinite(norm)):
                    raise UserError(
                        f"the loss is not finite at step {step} (loss {train_loss}, gradient norm {norm}): "
                        "try a lower --optim.lr; no weights were saved"
                    )
                now = time.perf_counter()
                speed = (step - logged_step) * settings.batch_tokens / (now - logged_at)
                record = {"step": step, "tokens": step * settings.batch_tokens, "seconds": round(now - start, 2)}
                record |= {"loss": train_loss, "lr": lr, "grad_norm": norm, "tokens_per_second": round(speed)}
                write(record)
                display.update(step, train_loss, lr, norm, speed, left=(now - start) * max(0.0, 1 / progress - 1))
                logged_at, logged_step = now, step
                loss_sum.zero_()
            if (step % settings.eval_every == 0 or progress >= 1) and not stop.caught:
                before = time.perf_counter()
                validation_loss = evaluate(model, held_out, settings.micro_batch, device)
                write({"step": step, "validation_loss": validation_loss})
                display.validated(step, validation_loss)
                evaluating += time.perf_counter() - before
                logged_at += time.perf_counter() - before
    tokens_seen = step * settings.batch_tokens
    return Result(step, tokens_seen, round(tokens_seen / (time.perf_counter() - start - evaluating)), validation_loss)


@dataclass(frozen=True)
class Result:
    """What the loop reached."""

    step: int
    tokens: int
    tokens_per_second: float
    validation_loss: float | None  # nats per token; None: interrupted before the first validation


@dataclass(frozen=True)
class HeldOut:
    """The held-out windows, int64 ``[windows, context]``, and what the token frequencies make of them."""

    inputs: np.ndarray
    targets: np.ndarray
    unigram_loss: float  # nats per token
    bytes_per_token: float

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer, tokens: np.ndarray, validation: np.ndarray) -> HeldOut:
        starts = data.spread(validation, config.model.context, config.train.eval_tokens)
        inputs, targets = data.cut(validation, starts, config.model.context)
        unigram = data.unigram_loss(tokens, targets, tokenizer.vocab_size)
        return cls(inputs, targets, unigram, float(tokenizer.byte_lengths()[targets].mean()))


@torch.no_grad()
def evaluate(model: nn.Module, held_out: HeldOut, micro_batch: int, device: torch.device) -> float:
    """Nats per token on the held-out windows."""
    total = torch.zeros((), device=device)
    for start in range(0, len(held_out.inputs), micro_batch):
        part = slice(start, start + micro_batch)
        inputs, targets = to_device((held_out.inputs[part], held_out.targets[part]), device)
        total += model(inputs, targets) * targets.numel()
    return total.item() / held_out.targets.size


def to_device(arrays: tuple[np.ndarray, np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    tensors = (torch.from_numpy(a) for a in arrays)
    if device.type == "cpu":
        return tuple(tensors)
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)


def pick_precision(precision: configs.Precision, device: torch.device) -> torch.dtype:
    """What the model computes in; the weights that the optimizer sees stay float32."""
    if precision != "auto":
        return getattr(torch, precision)
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: it unmaps large blocks, and a fresh one costs a page fault per 4 KiB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A process group of this process alone: no launcher, no port."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: GPT, precision: torch.dtype, device: torch.device) -> GPT:
    """Apply FSDP2 to each block and to the rest: float32 weights, copies in ``precision`` to compute with."""
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == torch.float32 else precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay float32
    )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in model.state_dict().items()}


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into ``caught`` (the signal's number); the second has its usual effect."""

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()
        report.say("stopping", "after this step, with the weights saved; once more to stop at once")


@contextmanager
def open_log(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds a record to ``path``, a line of JSON, at once."""
    with open(path, "ab", buffering=0) as file:

        def write(record: dict[str, Any]) -> None:
            try:
                file.write(json.dumps(record).encode() + b"\n")
            except OSError as error:
                raise UserError(f"can't write {path}: {error.strerror}") from None

        yield write


def check_free(out: Path) -> None:
    """Nothing in a run folder is ever overwritten."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a new folder")
    if out.is_dir() and any(out.iterdir()):
        what = "already holds a run" if (out / checkpoint.META).exists() else "is not empty"
        raise UserError(f"{out} {what}; choose another folder with --out")


def claim(out: Path | None) -> Path:
    """Make the run folder; where none is named a new one, so that no two runs share it."""
    named = out is not None
    out = out or Path("runs", datetime.now().strftime("%Y%m%d-%H%M%S"))
    try:
        if named:
            out.mkdir(parents=True, exist_ok=True)
            check_free(out)
            return out
        for number in range(1, 1000):
            try:
                fresh = out.with_name(out.name + (f"-{number}" if number > 1 else ""))
                fresh.mkdir(parents=True)
                return fresh
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"can't make the run folder {out}: {error.strerror}") from None
    raise UserError(f"can't make the run folder {out}: too many of that name")
