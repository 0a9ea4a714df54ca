"""Training: from text to a run folder, in one process or in as many as torchrun starts."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .. import __version__, console, run_dir
from .. import config as configs
from ..config import Config
from ..data import loader, sources
from ..data.tokenizer import Tokenizer
from ..distributed.gradients import full_state
from ..distributed.mesh import Layout, done_by_first, local_device, lost_processes, process_group
from ..distributed.parallelize import build
from ..errors import UserError
from ..files import write_atomic
from ..inference.generate import generate
from ..kernels.native import multiplies_bfloat16
from ..model.flops import count_parameters
from ..model.weights import save_weights
from . import metrics
from .plot import plot
from .signals import StopSignals
from .trainer import Loop, Text


def train(config: Config, out: Path | None = None, resume: bool = False) -> int:
    """Train as ``config`` says, into the run folder ``out`` (None: a new one under runs/). Returns the exit code.

    ``resume``: ``out`` is a run that ended early, or is to be longer; go on from its last checkpoint.
    """
    began = time.perf_counter()
    first = os.environ.get("RANK", "0") == "0"
    console.console.quiet = not first
    if first and out is not None and not resume:
        run_dir.check_free(out)
    device = local_device()
    if device.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    precision = pick_precision(config.train.precision, device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32

    with process_group(device):
        layout = Layout.of(config.parallel, device.type)
        out = done_by_first(lambda: go_on(config, out) if resume and out else prepare(config, out))
        config, meta, tokens = configs.load(out / run_dir.CONFIG), run_dir.load_meta(out), run_dir.load_tokens(out)
        meta |= {
            "status": "training",
            "steps": config.train.steps,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": dist.get_world_size(),
            "precision": str(precision).removeprefix("torch."),
            "fastllm": __version__,
            "torch": torch.__version__,
        }
        where = f"{meta['precision']} on {meta['device']}" + (f", {layout}" if layout.mesh.size() > 1 else "")
        console.say("model", f"{meta['parameters'] / 1e6:.1f}M parameters, {where}")
        with StopSignals() as stop, lost_processes(out):
            model = build(config, layout, precision, device)
            text = Text(tokens["train"], *held_out(config, tokens["validation"]))
            loop = Loop(config, layout, model, text, device, precision, out, stop)
            if resume:
                if loop.checkpoints.steps():  # else it ended before the first one
                    loop.restore()
                console.say("resumed", f"from step {loop.at.step} of {config.train.steps}")
            if first:
                run_dir.save_meta(out, meta)
            saved = loop.run()
            state = full_state(model)
            if first:
                save_weights(out / run_dir.WEIGHTS, state)
            dist.barrier()
    if first:
        at = loop.at
        meta |= {
            "status": "interrupted" if loop.ended_by else "finished",
            "step": at.step,
            "tokens": at.step * config.train.batch_tokens,
            "tokens_per_second": at.tokens_per_second(config.train.batch_tokens),
            "validation_loss": at.validation_loss,
            "spikes": at.spikes,
            "seconds_training": round(at.seconds, 2),
            "seconds_validating": round(at.validating, 2),
            "seconds_saving": round(at.saving, 2),
            "seconds": round(time.perf_counter() - began, 1),
        }
        run_dir.save_meta(out, meta)
        conclude(config, out, meta, device)
        if not saved:
            raise UserError(
                "the weights are saved, but the last checkpoint is not: --resume would start from one before"
            )
    return 128 + loop.ended_by if loop.ended_by else 0


def prepare(config: Config, out: Path | None) -> Path:
    """Make the run folder: the tokenizer, the encoded text, and the configuration as it will be trained."""
    corpus = sources.load_corpus(config.data.paths, config.data.validation)
    console.say("text", f"{corpus.name}: {len(corpus.train)} documents, {corpus.size / 1e6:.1f}M characters")
    for note in corpus.notes:
        console.say("", note)
    tokenizer = Tokenizer.train(corpus.train, config.model.vocab_size)
    config = replace(
        config,
        model=replace(config.model, vocab_size=tokenizer.vocab_size),
        data=replace(config.data, paths=tuple(str(Path(p).resolve()) for p in config.data.paths)),
    )
    tokens = {
        "train": loader.encode(tokenizer, corpus.train),
        "validation": loader.encode(tokenizer, corpus.validation),
    }
    for name, part in (("train on", tokens["train"]), ("hold out", tokens["validation"])):
        if len(part) <= config.model.context:
            raise UserError(
                f"too little text: {len(part)} tokens to {name}, at least {config.model.context + 1} are needed; "
                "give more text or lower --model.context"
            )
    sizes = f"{len(tokens['train']):,} to train on, {len(tokens['validation']):,} held out"
    console.say("tokenizer", f"{tokenizer.vocab_size:,} tokens; {sizes}")

    out = run_dir.claim(out)
    write_atomic(out / run_dir.CONFIG, configs.dump(config).encode())
    tokenizer.save(out / run_dir.TOKENIZER)
    run_dir.save_tokens(out, tokens)
    targets = held_out(config, tokens["validation"])[1]
    meta = {
        "status": "training",
        "step": 0,
        "steps": config.train.steps,
        "parameters": count_parameters(config.model)["total"],
        "unigram_loss": loader.unigram_loss(tokens["train"], targets, tokenizer.vocab_size),  # nats per token
        "bytes_per_token": float(tokenizer.byte_lengths()[targets].mean()),
    }
    run_dir.save_meta(out, meta)
    return out


def go_on(config: Config, out: Path) -> Path:
    """Take up the run in ``out`` once more, as ``config`` says now."""
    before = configs.load(out / run_dir.CONFIG)
    if config.model != before.model or config.data != before.data:
        raise UserError("--resume goes on with the model and the text of the run: leave out --model and --data")
    if (config.optim.optimizer, config.guard.window) != (before.optim.optimizer, before.guard.window):
        raise UserError("--resume goes on with --optim.optimizer and --guard.window of the run: leave them out")
    meta = run_dir.load_meta(out)
    if meta.get("step") == config.train.steps:
        raise UserError(f"{out} has all its {config.train.steps} steps; for more give a larger --train.steps")
    write_atomic(out / run_dir.CONFIG, configs.dump(config).encode())
    return out


def held_out(config: Config, validation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of the validation loss, int64 ``[windows, context]``."""
    return loader.cut(
        validation, loader.spread(validation, config.model.context, config.train.eval_tokens), config.model.context
    )


def conclude(config: Config, out: Path, meta: dict[str, Any], device: torch.device) -> None:
    """The plot of the run, a sample, and what a person is told at the end."""
    plot(out / metrics.LOG, out / "loss.png", meta["unigram_loss"])
    prompt = "" if config.data.paths else "def "
    if meta["status"] == "interrupted":
        console.say("interrupted", f"after step {meta['step']} of {meta['steps']}; all is saved")
        console.say("go on", f"fastllm train --resume {out}")
    else:
        sample = prompt + "".join(generate(*run_dir.load_run(out, device)[:2], prompt, max_tokens=120))
        write_atomic(out / "sample.txt", sample.encode())
        console.say("sample", sample)
        loss, per_byte = meta["validation_loss"], math.log(2) * meta["bytes_per_token"]
        console.say("validation", f"loss {loss:.3f} nats per token ({loss / per_byte:.3f} bits per byte)")
        console.say("", f"     {meta['unigram_loss']:.3f} a unigram model of the same tokens")
        console.say("speed", f"{meta['tokens_per_second']:,} tokens/s; {meta['seconds']:.0f} s in all")
    console.say("files", f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    console.say("try", f"fastllm generate {out}" + (f' --prompt "{prompt}"' if prompt else ""))


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
