"""Pre-training: from text to a run folder, in one process or in as many as torchrun starts."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import __version__, console, run_dir
from .. import config as configs
from ..config import Config
from ..data.from_sources import make_tokens
from ..data.token_data import TokenData
from ..data.tokenizer import Tokenizer
from ..distributed.gradients import full_state_dict
from ..distributed.mesh import (
    ParallelDims,
    local_device,
    process_group,
    rank_variable,
    run_on_all_ranks,
    run_on_rank0,
)
from ..distributed.parallelize import build_model
from ..errors import UserError
from ..evaluation import find_tasks
from ..files import write_atomic
from ..hardware import compute_dtype, host_memory
from ..inference import Engine, SamplingParams
from ..model.flops import count_parameters
from ..run_lock import LOCK, run_lock
from . import metrics
from .evaluation import LossEvaluator
from .final_weights import WeightsRecord, save_final
from .objectives import NextTokenPrediction
from .plot import plot
from .resume import check_continues, continue_run
from .run_data import RunData, baseline, load_run_data, open_tokens, say_data, token_paths
from .signals import StopSignals
from .state import TrainState
from .task_evaluation import task_evaluation
from .trainer import Trainer

# A file is cut into documents of at most this many characters for each token of max_seq_len: some sixteen sequences of
# the model. So every twelfth sequence or so has the end-of-text token, whatever the data: often enough to be learnt,
# and too seldom to keep the model from long texts.
DOCUMENT_CHARACTERS = 64

MANY_EPOCHS, FEW_EPOCHS = 100, 10  # text read more often than that is worth a warning; what the warning advises


class Run(NamedTuple):
    """A run folder that is ready for training, its final configuration and the contents of run.json."""

    folder: Path
    config: Config
    metadata: dict[str, Any]


def train(config: Config, output_dir: Path | None = None, resume: bool = False, from_weights: bool = False) -> int:
    """Train a GPT as ``config`` says.

    Args:
        config: all settings; the vocabulary size becomes that of the tokenizer.
        output_dir: the run folder, new or empty; None: a new one under runs/.
        resume: ``output_dir`` holds a run that ended early, or that ``config`` makes longer: continue it from its
            last checkpoint.
        from_weights: with ``resume``, of a run whose checkpoints are gone: continue from its weights instead, with a
            fresh optimizer.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        UserError: the data, the folder or the configuration can't be used, another process trains in the folder, or
            the loss spikes too often.
    """
    began = time.perf_counter()
    rank0 = rank_variable("RANK", 0) == 0
    console.console.quiet = not rank0
    if rank0 and output_dir is not None and not resume:
        run_dir.require_empty(output_dir)
    device = local_device()
    if device.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    precision = pick_precision(config.train.precision, device)
    check_memory(config, device)
    find_tasks(config.train.eval_tasks)  # before the data is read
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32

    with process_group(device) as heartbeat, ExitStack() as lock:
        dims = ParallelDims.from_config(config.parallel, device.type)
        run, data = start(config, output_dir, resume, lock)
        heartbeat.advice = f"fastllm train --resume {run.folder} continues from the last checkpoint"
        config, metadata = run.config, run.metadata
        metadata |= {
            "status": "training",
            "steps": config.train.steps,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "world_size": dist.get_world_size(),
            "precision": str(precision).removeprefix("torch."),
            "fastllm": __version__,
            "torch": torch.__version__,
        }
        where = f"{metadata['precision']} on {metadata['device']}" + (f", {dims}" if dims.mesh.size() > 1 else "")
        console.say("model", f"{metadata['parameters'] / 1e6:.1f}M parameters, {where}")
        tokenizer = data.tokens.tokenizer
        try:
            tasks = task_evaluation(config.train, config.model, tokenizer, precision)
        except UserError:
            if rank0 and not resume:
                shutil.rmtree(run.folder, ignore_errors=True)  # it was new or empty, and nothing was trained
            raise
        with StopSignals() as signals:
            objective = NextTokenPrediction()
            trainer = Trainer(
                config,
                dims,
                build_model(config, dims, precision, device),
                objective,
                data.train,
                LossEvaluator(objective, data.validation, len(data.validation), config.train.micro_batch),
                run_dir=run.folder,
                device=device,
                precision=precision,
                signals=signals,
                tasks=tasks,
            )
            if resume:
                continue_run(trainer, config, run.folder, from_weights)
            if rank0:
                write_atomic(run.folder / run_dir.CONFIG, configs.dump(config).encode())
                run_dir.save_metadata(run.folder, metadata)
            saved = trainer.run()
            weights = full_state_dict(trainer.model)
            if rank0:
                record = WeightsRecord(not trainer.stopped_by, asdict(trainer.state))
                save_final(run.folder, weights, record, {"tokenizer": metadata["tokenizer"]})
            dist.barrier()
        if rank0:
            metadata |= results(trainer.state, interrupted=bool(trainer.stopped_by))
            metadata["seconds"] = round(time.perf_counter() - began, 1)
            run_dir.save_metadata(run.folder, metadata)
            conclude(run, device)
            if not saved:
                raise UserError(
                    "the weights are saved, but the last checkpoint is not: --resume would start from the one before"
                )
    return 128 + trainer.stopped_by if trainer.stopped_by else 0


def start(config: Config, output_dir: Path | None, resume: bool, lock: ExitStack) -> tuple[Run, RunData]:
    """The run and its data on every rank. Rank 0 makes or checks the folder; all read the tokens, and check their
    share of them.

    The folder's lock is entered into ``lock``.
    """
    loaded: list[RunData] = []

    def on_rank0() -> Run:
        run, data = (resume_run if resume else prepare)(config, output_dir, lock)
        loaded.append(data)
        return run

    def load() -> RunData:
        data = loaded[0] if loaded else load_run_data(run.config, open_tokens(run.config, run.folder))
        data.tokens.verify(dist.get_rank(), dist.get_world_size())
        return data

    run = run_on_rank0(on_rank0)
    return run, run_on_all_ranks(load)


def prepare(config: Config, output_dir: Path | None, lock: ExitStack) -> tuple[Run, RunData]:
    """Make the run folder: the tokens, the tokenizer, and the configuration with the tokenizer's size."""
    paths = token_paths(config)
    tokens = TokenData(paths) if paths else None
    folder = run_dir.create(output_dir)
    lock.enter_context(run_lock(folder))
    try:
        if tokens is None:
            document = DOCUMENT_CHARACTERS * config.model.max_seq_len
            made = make_tokens(config.data.paths, config.model.vocab_size, document, folder)
            tokens = TokenData([made])
        config = replace(
            config,
            model=replace(config.model, vocab_size=tokens.vocab_size),
            data=replace(config.data, paths=tuple(map(os.path.realpath, config.data.paths))),
            train=config.train.with_real_paths(),
        )
        data = load_run_data(config, tokens)
        say_data(config, data)
        if warning := repetition_warning(config, data.train_tokens):
            console.say("warning", warning)
        write_atomic(folder / run_dir.CONFIG, configs.dump(config).encode())
        tokens.tokenizer.save(folder / run_dir.TOKENIZER)
        metadata = {
            "status": "training",
            "step": 0,
            "steps": config.train.steps,
            "parameters": count_parameters(config.model)["total"],
            "tokenizer": tokens.tokenizer.fingerprint,
            "data": tokens.checksum,
            **baseline(data),
        }
        run_dir.save_metadata(folder, metadata)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was new or empty
        raise
    return Run(folder, config, metadata), data


def repetition_warning(config: Config, tokens: int) -> str:
    """What to tell the user where the run reads its ``tokens`` for training too often to learn from; else empty."""
    per_step = config.train.global_batch_tokens
    epochs = config.train.steps * per_step / tokens
    if epochs <= MANY_EPOCHS:
        return ""
    fewer = max(1, round(FEW_EPOCHS * tokens / per_step))
    advice = f"--train.steps {fewer:,} reads it {max(1, round(fewer * per_step / tokens)):,} times"
    return (
        f"{config.train.steps:,} steps of {per_step:,} tokens read the training text ({tokens:,} tokens) "
        f"{epochs:,.0f} times over, and learn it by heart; give more text, or train for less: {advice}"
    )


def resume_run(config: Config, folder: Path | None, lock: ExitStack) -> tuple[Run, RunData]:
    """Check that ``config`` continues the run in ``folder``, which is not changed yet."""
    if folder is None or not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    lock.enter_context(run_lock(folder))
    check_continues(config, configs.load(folder / run_dir.CONFIG))
    metadata = run_dir.load_metadata(folder)
    tokens = open_tokens(config, folder)
    if Tokenizer.load(folder / run_dir.TOKENIZER).fingerprint != metadata.get("tokenizer"):
        raise UserError(f"{folder / run_dir.TOKENIZER} is not the tokenizer that the run began with")
    if tokens.checksum != metadata.get("data"):
        where = ", ".join(str(part.path) for part in tokens.folders)
        raise UserError(f"{where} has not the tokens that the run began with")
    data = load_run_data(config, tokens)
    return Run(folder, config, metadata | baseline(data)), data


def results(state: TrainState, interrupted: bool) -> dict[str, Any]:
    """What run.json says of a run that has ended."""
    return {
        "status": "interrupted" if interrupted else "finished",
        "step": state.step,
        "tokens": state.tokens,
        "tokens_per_second": state.tokens_per_second(),
        "validation_loss": state.validation_loss,
        "spikes": state.spikes,
        "seconds_training": round(state.seconds, 2),
        "seconds_evaluating": round(state.seconds_evaluating, 2),
        "seconds_saving": round(state.seconds_saving, 2),
    }


def conclude(run: Run, device: torch.device) -> None:
    """The plot of the run, a sample, and a summary for the person who started it."""
    folder, config, metadata = run
    plot(folder / metrics.LOG, folder / "loss.png", unigram_loss=metadata["unigram_loss"])
    prompt = "" if config.data.paths else "def "
    if metadata["status"] == "interrupted":
        console.say("interrupted", f"after step {metadata['step']} of {metadata['steps']}; everything is saved")
        console.say("continue", f"fastllm train --resume {folder}")
    else:
        model, tokenizer = run_dir.load_run(folder, device)
        params = SamplingParams(max_tokens=120, temperature=0.8, top_k=50, seed=0)
        sample = prompt + Engine(model, tokenizer, max_batch=1).generate([prompt], params)[0].text
        write_atomic(folder / "sample.txt", sample.encode())
        console.say("sample", sample)
        loss, per_byte = metadata["validation_loss"], math.log(2) * metadata["bytes_per_token"]
        console.say("validation", f"loss {loss:.3f} nats per token ({loss / per_byte:.3f} bits per byte)")
        console.say("", f"     {metadata['unigram_loss']:.3f} a unigram model of the same tokens")
        console.say("speed", f"{metadata['tokens_per_second']:,} tokens/s; {metadata['seconds']:.0f} s in total")
    console.say("files", f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir() if p.name != LOCK))}")
    console.say("try", f"fastllm generate {folder}" + (f' --prompt "{prompt}"' if prompt else ""))


def pick_precision(precision: configs.Precision, device: torch.device) -> torch.dtype:
    """What the model computes in; the weights that the optimizer updates stay float32."""
    if precision != "auto":
        return getattr(torch, precision)
    return compute_dtype(device)


def check_memory(config: Config, device: torch.device) -> None:
    """Raise UserError where the weights alone, with gradients and optimizer, are more than this rank's memory."""
    world, local = rank_variable("WORLD_SIZE", 1), rank_variable("LOCAL_WORLD_SIZE", 1)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = host_memory() // max(local, 1)
    needed = 16 * count_parameters(config.model)["total"] // max(world, 1)  # weight, gradient and two moments, float32
    if needed > memory:
        sizes = f"{needed / 2**30:,.0f} GiB on each rank for its weights, gradients and optimizer"
        raise UserError(f"the model needs {sizes}, and has {memory / 2**30:,.0f}; fastllm plan shows what fits")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: it unmaps large blocks, and a fresh one costs a page fault per 4 KiB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
