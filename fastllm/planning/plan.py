"""What a run takes before it is started: size, compute-optimal settings, memory, time and cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from .. import config as configs
from .. import console
from ..config import ActivationCheckpointing, Config
from ..console import short
from ..errors import UserError, did_you_mean
from ..files import write_atomic
from ..hardware import GPUS, Gpu, this_machine
from ..model.flops import count_parameters, flops_per_token
from .memory import MemoryEstimate, estimate_memory
from .presets import PRESETS, preset
from .scaling_laws import compute_optimal, model_of_depth, model_of_size

GPU_COUNTS = (1, 2, 4, *(8 * 2**n for n in range(11)))  # tried where --gpus does not say
MAX_DAYS = 14.0  # of a run, if more GPUs can shorten it
RESERVED = 3 * 2**30  # bytes for CUDA, NCCL and fragmentation


@dataclass(frozen=True)
class PlanArguments:
    """Settings, memory, time and cost of a run: of a preset, a configuration file or a size; else of all presets.

    Memory comes from a dry run of the sharded model. Time is what the FLOPs take at --mfu of the
    data sheet's rate.
    """

    what: tyro.conf.Positional[str] = ""  # a preset or a TOML file, as for fastllm train
    depth: int = 0  # layers of a model of that depth
    params: float = 0.0  # parameters, such as 1.3e9; the nearest depth is taken
    gpus: int = 0  # 0: the fewest that hold the model and end within two weeks
    gpu: str = "h100"  # a100, h100, h200, b200; or this: this machine
    out: Path | None = None  # write the configuration to this file, for fastllm train
    max_seq_len: int = 2048  # with --depth and --params
    vocab_size: int = 50_304  # with --depth and --params
    tokens: float = 0.0  # tokens to train on; 0: as configured, which is 20 a parameter for presets
    mfu: float = 0.4  # share of the peak FLOP/s that training reaches
    dollars: float = 0.0  # price of a GPU hour; 0: the usual price
    micro_batch: int = 0  # sequences of a forward pass; 0: as configured
    tensor_parallel: int = 0  # ranks that share each matrix; 0: as configured
    dp_replicate: int = 0  # replicas of the sharded model; 0: as configured
    activation_checkpointing: ActivationCheckpointing | None = None  # none, selective or full; left out: as configured


@dataclass(frozen=True)
class Plan:
    """A run on ``gpus`` of ``gpu``."""

    config: Config
    gpu: Gpu
    gpus: int
    mfu: float

    @property
    def tokens(self) -> int:
        return self.config.train.steps * self.config.train.global_batch_tokens

    @property
    def flops(self) -> float:
        return float(flops_per_token(self.config.model)) * self.tokens

    @property
    def seconds(self) -> float:
        return self.flops / (self.gpus * self.gpu.flops * self.mfu)

    @property
    def dollars(self) -> float:
        return self.gpus * self.seconds / 3600 * self.gpu.dollars

    def memory(self) -> MemoryEstimate:
        """Of a GPU; the estimate takes seconds."""
        precision = torch.float32 if self.config.train.precision == "float32" else torch.bfloat16
        with warnings.catch_warnings(action="ignore"):
            return estimate_memory(self.config, self.gpus, precision)

    def fits(self, needed: MemoryEstimate) -> bool:
        return needed.total + RESERVED <= self.gpu.memory


def plan(arguments: PlanArguments) -> int:
    """Print the plan. The exit code."""
    gpu = _gpu(arguments)
    for name, ok, rule in (
        ("mfu", 0 < arguments.mfu <= 1, "be greater than 0 and at most 1"),
        ("gpus", arguments.gpus >= 0, "not be negative"),
        ("tokens", arguments.tokens >= 0, "not be negative"),
    ):
        if not ok:
            raise UserError(f"--{name} must {rule}")
    chosen = dict(_chosen(arguments))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    with console.working(f"dry runs of {len(chosen)} models" if len(chosen) > 1 else "a dry run"):
        for name, config in chosen.items():
            found, needed = _placed(config, gpu, arguments)
            table.add_row(name, *_row(found, needed))
    Console(width=max(console.console.width, 170), highlight=False).print(table)  # wide: a narrow terminal wraps lines
    console.console.print(
        f"\n{gpu.name}: {gpu.flops / 1e12:.3g} TFLOP/s, {gpu.memory / 2**30:.0f} GiB, ${gpu.dollars:.2f} an hour; "
        f"time at {arguments.mfu:.0%} of the rate\nmemory: of the tensors of a rank at the peak of a step, state + "
        f"temporary; {RESERVED / 2**30:.0f} GiB are left for CUDA and NCCL"
    )
    if len(chosen) == 1:
        (config,) = chosen.values()
        _details(config)
        if arguments.out:
            write_atomic(arguments.out, configs.dump(config).encode())
            console.console.print(f"\nfastllm train {arguments.out}")
    return 0


HEADINGS = (
    "model", "parameters", "dim", "layers", "heads", "max seq len", "tokens", "batch", "lr", "steps", "FLOPs", "GPUs",
    "memory/GPU", "time", "cost",
)  # fmt: skip


def _row(found: Plan, needed: MemoryEstimate) -> Iterator[str]:
    model, train = found.config.model, found.config.train
    yield short(count_parameters(model)["total"])
    yield str(model.dim)
    yield str(model.layers)
    yield f"{model.heads}/{model.kv_heads}"
    yield str(model.max_seq_len)
    yield short(found.tokens)
    yield short(train.global_batch_tokens)
    yield f"{found.config.optim.lr:.2g}"
    yield f"{train.steps:,}"
    yield f"{found.flops:.1e}"
    yield str(found.gpus)
    yield f"{needed.state / 2**30:.1f} + {needed.working / 2**30:.1f} GiB" + ("" if found.fits(needed) else " !")
    yield duration(found.seconds)
    yield f"${found.dollars:,.0f}" if found.dollars >= 10 else f"${found.dollars:.2f}"


def _details(config: Config) -> None:
    parts = count_parameters(config.model)
    total = parts.pop("total")
    shares = ", ".join(f"{name} {short(n)} ({n / total:.0%})" for name, n in parts.items() if n)
    parallel = config.parallel
    console.console.print(
        f"\nparameters   {shares}\n"
        f"FLOPs        {flops_per_token(config.model):.3e} a token, forward and backward\n"
        f"sharding     over all GPUs; dp_replicate {parallel.dp_replicate}, "
        f"tensor_parallel {parallel.tensor_parallel}, "
        f"reshard_after_forward {str(parallel.reshard_after_forward).lower()}, "
        f"activation_checkpointing {parallel.activation_checkpointing}, micro_batch {config.train.micro_batch}"
    )


def _gpu(arguments: PlanArguments) -> Gpu:
    if arguments.gpu != "this" and arguments.gpu not in GPUS:
        raise UserError(f"unknown --gpu {arguments.gpu!r}{did_you_mean(arguments.gpu, [*GPUS, 'this'])}")
    gpu = this_machine() if arguments.gpu == "this" else GPUS[arguments.gpu]
    return replace(gpu, dollars=arguments.dollars) if arguments.dollars else gpu


def _chosen(arguments: PlanArguments) -> Iterator[tuple[str, Config]]:
    given = [name for name in ("what", "depth", "params") if getattr(arguments, name)]
    if len(given) > 1:
        raise UserError("give one of a preset or file, --depth and --params")
    if not given:
        if arguments.out:
            raise UserError("--out writes one configuration: name a preset, --depth or --params")
        yield from ((name, _changed(config, arguments)) for name, config in PRESETS.items() if name != "default")
    elif given == ["what"]:
        is_file = arguments.what.endswith(".toml")
        yield arguments.what, _changed(configs.load(arguments.what) if is_file else preset(arguments.what), arguments)
    else:
        size = (arguments.vocab_size, arguments.max_seq_len)
        if min(*size, arguments.depth + arguments.params) <= 0:
            raise UserError("--depth, --params, --max-seq-len and --vocab-size must be greater than 0")
        model = model_of_depth(arguments.depth, *size) if arguments.depth else model_of_size(arguments.params, *size)
        config = compute_optimal(model, micro_batch=max(1, 16_384 // model.max_seq_len))
        large = count_parameters(model)["total"] > 1e9
        checkpointing: ActivationCheckpointing = "selective" if large else "none"
        saving = replace(config.parallel, reshard_after_forward=large, activation_checkpointing=checkpointing)
        yield f"depth {model.layers}", _changed(replace(config, parallel=saving), arguments)


def _changed(config: Config, arguments: PlanArguments) -> Config:
    """``config`` with the settings that the arguments override."""
    names = ("tensor_parallel", "dp_replicate", "activation_checkpointing")
    parallel = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    train: dict[str, Any] = {"micro_batch": arguments.micro_batch} if arguments.micro_batch else {}
    if arguments.tokens:
        train["steps"] = max(1, round(arguments.tokens / config.train.global_batch_tokens))
    return replace(
        config, parallel=replace(config.parallel, **parallel), train=replace(config.train, **train)
    )  # fmt: skip


def _placed(config: Config, gpu: Gpu, arguments: PlanArguments) -> tuple[Plan, MemoryEstimate]:
    """The plan on the GPUs asked for, or on the fewest that suffice."""
    unit = config.parallel.tensor_parallel * config.parallel.dp_replicate
    most = config.sequences * config.parallel.tensor_parallel  # each needs a sequence of the batch
    if arguments.gpus:
        if arguments.gpus % unit:
            raise UserError(f"--gpus ({arguments.gpus}) must be a multiple of dp_replicate x tensor_parallel ({unit})")
        if arguments.gpus > most:
            raise UserError(f"--gpus must be at most {most}: the batch has {config.sequences} sequences")
        found = Plan(config, gpu, arguments.gpus, arguments.mfu)
        return found, found.memory()
    counts = [n for n in GPU_COUNTS if n % unit == 0 and n <= most] or [unit]
    for count in counts:
        found = Plan(config, gpu, count, arguments.mfu)
        if found.seconds > MAX_DAYS * 86_400 and count != counts[-1]:
            continue
        needed = found.memory()
        if found.fits(needed) or count == counts[-1]:
            break
    return found, needed


def duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
