"""A run of post-training, whatever its method: the folder, the model, the trainer, and the end."""

from __future__ import annotations

import os
import shutil
import sys
import time
import zlib
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from .. import __version__, console, run_dir
from .. import config as configs
from ..data.loader import DataSource
from ..data.permutation import key_of
from ..data.tokenizer import Tokenizer
from ..distributed.gradients import full_state_dict
from ..distributed.mesh import (
    ParallelDims,
    abort_all_ranks,
    local_device,
    process_group,
    rank_variable,
    run_on_all_ranks,
    run_on_rank0,
)
from ..distributed.parallelize import parallelize
from ..errors import UserError
from ..evaluation import find_tasks
from ..files import write_atomic
from ..inference.load import load
from ..input_files import read_bytes
from ..model.gpt import GPT
from ..run_lock import run_lock
from ..training.evaluation import Evaluator
from ..training.final_weights import WeightsRecord, save_final
from ..training.metrics import LOG
from ..training.objectives import Objective
from ..training.plot import Panel, plot
from ..training.pretrain import keep_freed_memory, pick_precision, results
from ..training.signals import StopSignals
from ..training.task_evaluation import task_evaluation
from ..training.trainer import Trainer
from . import base
from .config import RewardConfig, SftConfig, TuneConfig
from .rendering import learn_end_of_turn, prepare_template
from .rewards import absolute

EXAMPLES = "examples.safetensors"  # in a run folder: the data as tokens
LONGEST = 2048  # tokens of a sequence, where data.max_seq_len does not say


class Context(NamedTuple):
    """What a method's task is made with, on each rank."""

    config: Any  # the method's
    folder: Path
    model: GPT  # sharded
    tokenizer: Tokenizer
    dims: ParallelDims
    device: torch.device
    precision: torch.dtype
    metadata: dict[str, Any]
    resources: ExitStack  # what ends with the run


class Task(NamedTuple):
    """What is minimised, over what, and how it is evaluated."""

    objective: Objective
    data: DataSource
    evaluator: Evaluator | None


class Method(Protocol):
    """A method of post-training."""

    name: str
    panels: tuple[Panel, ...]  # of the plot

    def prepare(self, config: Any, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
        """Encode the data into ``folder``; what run.json says of it, with "items" (to train on) and "data", its
        checksum. On rank 0."""
        ...

    def task(self, context: Context) -> Task:
        """On every rank."""
        ...

    def warnings(self, log: Path) -> list[str]:
        """What to tell the user about the log of a run that has ended."""
        ...


def tune(method: Method, config: TuneConfig, output_dir: Path | None = None, resume: bool = False) -> int:
    """Train the model at ``config.base.path`` by ``method``.

    Args:
        config: all settings; ``config.model`` becomes the model's.
        output_dir: the run folder, new or empty; None: a new one under runs/.
        resume: ``output_dir`` holds a run that ended early: continue it from its last checkpoint.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        UserError: the model, the data, the folder or the configuration can't be used.
    """
    began = time.perf_counter()
    rank0 = rank_variable("RANK", 0) == 0
    console.console.quiet = not rank0
    device = local_device()
    if device.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    precision = pick_precision(config.train.precision, device)
    torch.set_float32_matmul_precision("high")
    find_tasks(config.train.eval_tasks)  # before the data is read

    with process_group(device) as heartbeat, ExitStack() as lock, ExitStack() as resources:
        dims = ParallelDims.from_config(config.parallel, device.type)
        model, tokenizer = run_on_all_ranks(lambda: load(config.base.path))
        model, tokenizer = run_on_all_ranks(lambda: prepare_model(config, model, tokenizer))
        config = replace(config, model=model.config)
        run_on_all_ranks(lambda: configs.check_tensor_parallel(model.config, config.parallel))
        make = resume_run if resume else start_run
        run = run_on_rank0(lambda: make(method, config, output_dir, model, tokenizer, lock))
        folder, config, metadata = run
        heartbeat.advice = f"fastllm {method.name} --resume {folder} continues from the last checkpoint"
        if config.lora.rank:
            run_on_all_ranks(lambda: base.add_adapters(model, config.lora, config.train.seed))
        else:
            model.float()
        trained, total = base.trainable_parameters(model)
        metadata |= {
            "status": "training",
            "steps": config.train.steps,
            "parameters": total,
            "trainable_parameters": trained,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "world_size": dist.get_world_size(),
            "precision": str(precision).removeprefix("torch."),
            "fastllm": __version__,
            "torch": torch.__version__,
        }
        where = f"{metadata['precision']} on {metadata['device']}" + (f", {dims}" if dims.mesh.size() > 1 else "")
        share = f"{trained / 1e6:.2f}M trained, " if trained < total else ""
        console.say("model", f"{total / 1e6:.1f}M parameters, {share}{where}")
        model.train()
        parallelize(model, config.parallel, dims, precision)
        model.to(device)
        torch.manual_seed(key_of(config.train.seed, dims.dp_rank) >> 1)  # of the adapters' dropout
        with StopSignals() as signals:
            try:
                tasks = task_evaluation(
                    config.train, config.model, tokenizer, precision, base.merge_of(config, precision)
                )
                task = method.task(
                    Context(config, folder, model, tokenizer, dims, device, precision, metadata, resources)
                )
            except UserError:
                if not resume:
                    shutil.rmtree(folder, ignore_errors=True)  # nothing was trained
                raise
            trainer = Trainer(
                config, dims, model, task.objective, task.data, task.evaluator, run_dir=folder, device=device,
                precision=precision, signals=signals, evaluate_first=True, tasks=tasks,
            )  # fmt: skip
            if resume:
                continue_run(trainer, folder)
            if rank0:
                write_atomic(folder / run_dir.CONFIG, configs.dump(config).encode())
                run_dir.save_metadata(folder, metadata)
            saved = trainer.run()
            state = full_state_dict(model)
            if rank0:
                save_model(folder, config, state, trainer, metadata["tokenizer"])
            dist.barrier()
        if rank0:
            metadata |= results(trainer.state, interrupted=bool(trainer.stopped_by))
            metadata["seconds"] = round(time.perf_counter() - began, 1)
            run_dir.save_metadata(folder, metadata)
            conclude(method, folder, metadata)
            if not saved:
                raise UserError(
                    "the weights are saved, but the last checkpoint is not: --resume would start from the one before"
                )
    return 128 + trainer.stopped_by if trainer.stopped_by else 0


def prepare_model(config: TuneConfig, model: GPT, tokenizer: Tokenizer) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer, with a chat template and the tokens that it needs."""
    data = config.data
    source = read_bytes(data.chat_template).decode(errors="replace") if data.chat_template else None
    wanted = (*prepare_template(tokenizer, source), *data.new_tokens)
    if wanted and config.lora.rank:
        raise UserError(
            f"the model lacks the tokens {', '.join(wanted)} of its chat template, and adapters don't learn new ones: "
            "train it without --lora.rank first, or give a --data.chat-template that needs none"
        )
    model, tokenizer = base.grow_vocabulary(model, tokenizer, wanted)
    learn_end_of_turn(tokenizer)
    return model, tokenizer


def sequence_length(config: TuneConfig) -> int:
    """Tokens of a sequence, at most; ranks that share sequences have equally many."""
    longest = min(config.data.max_seq_len or LONGEST, config.model.max_seq_len)
    return longest // config.parallel.tensor_parallel * config.parallel.tensor_parallel


class Run(NamedTuple):
    """A run folder that is ready for training, its final configuration and the contents of run.json."""

    folder: Path
    config: TuneConfig
    metadata: dict[str, Any]


def start_run(
    method: Method, config: TuneConfig, output_dir: Path | None, model: GPT, tokenizer: Tokenizer, lock: ExitStack
) -> Run:
    """Make the run folder and encode the data. On rank 0."""
    if output_dir is not None:
        run_dir.require_empty(output_dir)
    folder = run_dir.create(output_dir)
    lock.enter_context(run_lock(folder))
    try:
        config = with_real_paths(config)
        base.save_tokenizer(folder, tokenizer)
        found = method.prepare(config, tokenizer, folder)
        steps = max(1, round(config.train.epochs * found["items"] / config.items_per_step))
        config = replace(config, train=replace(config.train, steps=min(config.train.steps, steps)))
        write_atomic(folder / run_dir.CONFIG, configs.dump(config).encode())
        metadata = {
            "status": "training",
            "method": config.base.method,
            "base": config.base.path,
            "base_weights": weights_checksum(model),
            "step": 0,
            "tokenizer": tokenizer.fingerprint,
            **found,
        }
        run_dir.save_metadata(folder, metadata)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was new or empty
        raise
    return Run(folder, config, metadata)


def with_real_paths(config: TuneConfig) -> TuneConfig:
    """``config`` with paths that hold in any working directory."""
    real, data = os.path.realpath, config.data
    paths, eval_paths = (tuple(map(real, names)) for names in (data.paths, data.eval_paths))
    template = data.chat_template and real(data.chat_template)
    data = replace(data, paths=paths, eval_paths=eval_paths, chat_template=template)
    own = replace(config.base, path=real(config.base.path))
    config = replace(config, data=data, base=own, train=config.train.with_real_paths())
    if isinstance(config, SftConfig) and config.teacher.path:
        return replace(config, teacher=replace(config.teacher, path=real(config.teacher.path)))
    if isinstance(config, RewardConfig):
        return replace(config, grpo=replace(config.grpo, reward=absolute(config.grpo.reward)))
    return config


def resume_run(
    method: Method, config: TuneConfig, folder: Path | None, model: GPT, tokenizer: Tokenizer, lock: ExitStack
) -> Run:
    """Check that ``config`` continues the run in ``folder``, which is not changed yet. On rank 0."""
    if folder is None or not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    lock.enter_context(run_lock(folder))
    metadata = run_dir.load_metadata(folder)
    path = folder / run_dir.CONFIG
    before = configs.merged(config, configs.read_toml(path), path)
    for section in fields(config):
        now, then = getattr(config, section.name), getattr(before, section.name)
        if section.name not in ("train", "optim", "checkpoint", "spikes", "parallel") and now != then:
            raise UserError(f"--resume continues with the [{section.name}] of the run: leave its options out")
    if config.train.seed != before.train.seed or config.items_per_step != before.items_per_step:
        raise UserError("--resume continues with the train.seed and train.batch_size of the run: leave them out")
    if tokenizer.fingerprint != metadata.get("tokenizer") or weights_checksum(model) != metadata.get("base_weights"):
        raise UserError(f"{config.base.path} is not the model that the run began with")
    if metadata.get("status") == "finished" and config.train.steps <= metadata.get("step", 0):
        raise UserError(f"{folder} has all its {metadata['step']} steps; for more give a larger --train.steps")
    return Run(folder, config, metadata)


def continue_run(trainer: Trainer, folder: Path) -> None:
    """Bring the trainer to the run's last intact checkpoint."""
    step = trainer.restore()
    if step is None and trainer.checkpoints.steps():
        abort_all_ranks(f"{folder} has no intact checkpoint: begin a new run")
    console.say("resumed", f"from step {step or 0} of {trainer.config.train.steps}")


def weights_checksum(model: GPT) -> str:
    """Stands for the weights, in hexadecimal."""
    total = 0
    for tensor in model.state_dict().values():
        total = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def save_model(
    folder: Path, config: TuneConfig, state: dict[str, torch.Tensor], trainer: Trainer, fingerprint: str
) -> None:
    """Write the weights; of a model with adapters these, and what they make of the base's weights."""
    if config.lora.rank:
        base.save_adapter(folder, state, config.lora, config.base.path)
        state = base.merged_state(state, config.lora)
    record = WeightsRecord(not trainer.stopped_by, asdict(trainer.state))
    save_final(folder, state, record, {"tokenizer": fingerprint})


def conclude(method: Method, folder: Path, metadata: dict[str, Any]) -> None:
    """The plot of the run, and a summary for the person who started it."""
    plot(folder / LOG, folder / "loss.png", method.panels)
    for warning in method.warnings(folder / LOG):
        console.say("warning", warning)
    if metadata["status"] == "interrupted":
        console.say("interrupted", f"after step {metadata['step']} of {metadata['steps']}; everything is saved")
        console.say("continue", f"fastllm {method.name} --resume {folder}")
        return
    if metadata["validation_loss"] is not None:
        console.say("validation", f"loss {metadata['validation_loss']:.4f}")
    console.say("speed", f"{metadata['tokens_per_second']:,} learnt tokens/s; {metadata['seconds']:.0f} s in total")
    console.say("files", f"{folder}: model.safetensors, {LOG}, loss.png and more")
    console.say("try", f"fastllm chat {folder}")
