"""What a run is made of: the configuration, and its TOML files."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from .errors import UserError, did_you_mean


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _check_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value > 0, f"{section}.{name} must be greater than 0, it is {value}")


def _check_choice(section: str, config: Any, name: str, choices: Any) -> None:
    value = getattr(config, name)
    names = get_args(choices)
    _check(value in names, f"{section}.{name} must be one of {', '.join(names)}, it is {value!r}")


RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the GPT."""

    vocab_size: int = 4096  # tokens that the tokenizer is trained to have; fewer where the text is short
    context: int = 256  # tokens that the model sees at once
    dim: int = 128  # features of the residual stream
    layers: int = 2
    heads: int = 2  # query heads; a head has dim / heads features
    kv_heads: int = 1  # key/value heads, a divisor of heads
    attention_dim: int = 0  # features of all query heads together; 0: dim
    hidden_dim: int = 352  # features inside the MLP
    window: int = 0  # a token sees this many latest ones, itself included; 0: all
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling = "none"  # how they were stretched to a longer context
    rope_factor: float = 1.0  # by how much
    rope_original_context: int = 0  # the context that they were made for (llama3 and yarn)
    norm_eps: float = 1e-6  # added to the mean of squares in RMSNorm
    qk_norm: bool = False  # normalise queries and keys, as Qwen3 does
    qkv_bias: bool = False  # add a bias to queries, keys and values, as Qwen2 does
    tie_embeddings: bool = True  # the head shares the embedding's weight

    def __post_init__(self) -> None:
        _check_positive(
            "model", self, "vocab_size", "context", "dim", "layers", "heads", "kv_heads", "hidden_dim", "rope_theta"
        )
        _check(
            self.vocab_size >= 257, f"model.vocab_size must be at least 257 (256 bytes and 1), it is {self.vocab_size}"
        )
        _check(
            self.heads % self.kv_heads == 0,
            f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.kv_heads})",
        )
        for name in ("attention_dim", "window"):
            _check(getattr(self, name) >= 0, f"model.{name} must not be negative, it is {getattr(self, name)}")
        name, width = ("attention_dim", self.attention_dim) if self.attention_dim else ("dim", self.dim)
        _check(
            width % (2 * self.heads) == 0,
            f"model.{name} ({width}) must be a multiple of 2 * model.heads ({self.heads}): rotary pairs",
        )
        _check(self.head_dim <= 256, f"model.{name} / model.heads ({self.head_dim}) must be at most 256")
        _check_choice("model", self, "rope_scaling", RopeScaling)
        _check(self.rope_factor >= 1, f"model.rope_factor must be at least 1, it is {self.rope_factor}")
        _check(
            self.rope_scaling != "none" or self.rope_factor == 1, "model.rope_scaling 'none' has no model.rope_factor"
        )
        stretched = self.rope_scaling in ("llama3", "yarn")
        _check(
            self.rope_original_context > 0 if stretched else self.rope_original_context == 0,
            f"model.rope_scaling {self.rope_scaling!r} {'needs' if stretched else 'has no'} "
            "model.rope_original_context",
        )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return (self.attention_dim or self.dim) // self.heads


@dataclass(frozen=True)
class DataConfig:
    """The text."""

    paths: tuple[str, ...] = ()  # text files and folders (--data for short); none: Python's standard library
    validation: float = 0.05  # share of the text that is held out

    def __post_init__(self) -> None:
        _check(0 < self.validation < 1, f"data.validation must be between 0 and 1, it is {self.validation}")


Optimizer = Literal["adamw", "muon"]
Schedule = Literal["wsd", "linear", "cosine"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    optimizer: Optimizer = "adamw"  # or muon, for the matrices of the blocks
    lr: float = 4e-3  # peak learning rate
    schedule: Schedule = "wsd"  # after the warm-up: constant and then a line down, a line down, or half a cosine
    warmup: float = 0.02  # share of the run in which the learning rate rises
    decay: float = 0.8  # share of the run in which it falls, with wsd
    final: float = 0.0  # the learning rate at the end, as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # largest norm of the gradient

    def __post_init__(self) -> None:
        _check_positive("optim", self, "lr", "clip")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"optim.{name} must be at least 0 and less than 1, it is {value}")
        _check_choice("optim", self, "optimizer", Optimizer)
        _check_choice("optim", self, "schedule", Schedule)
        _check(0 <= self.final <= 1, f"optim.final must be between 0 and 1, it is {self.final}")
        _check(self.weight_decay >= 0, f"optim.weight_decay must not be negative, it is {self.weight_decay}")
        _check(
            self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1,
            f"optim.warmup ({self.warmup}) and optim.decay ({self.decay}) are shares of the run: 1 at most together",
        )


Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun starts share the model. Parameters are sharded over all of them (FSDP2)."""

    replicate: int = 1  # copies of the sharded model (HSDP): gradients are summed over them
    tensor: int = 1  # processes that share each matrix and each sequence (tensor and sequence parallel)
    reshard: bool = False  # gather a block's parameters once more in the backward pass: less memory, more traffic
    recompute: Recompute = "none"  # in the backward pass: none, selective (what is cheap) or full (all of a block)
    compile: bool = False  # torch.compile each block

    def __post_init__(self) -> None:
        _check_positive("parallel", self, "replicate", "tensor")
        _check_choice("parallel", self, "recompute", Recompute)


Policy = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True)
class GuardConfig:
    """What happens at a spike: a loss or gradient norm that is not finite, or far above the latest ones."""

    policy: Policy = "skip"  # skip the update, rollback to the last checkpoint and on behind that text, or stop
    sigma: float = 6.0  # standard deviations above the mean of the window
    window: int = 128  # steps
    limit: int = 10  # spikes in a window that end the run

    def __post_init__(self) -> None:
        _check_positive("guard", self, "sigma", "window", "limit")
        _check_choice("guard", self, "policy", Policy)


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can go on from."""

    every: int = 100  # steps between checkpoints; there is one at the end in any case
    keep: int = 2  # the latest ones; older ones are deleted

    def __post_init__(self) -> None:
        _check_positive("checkpoint", self, "every", "keep")


Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1200  # optimizer steps
    seconds: float = 0.0  # end after this time, even if steps are left; 0: no limit
    batch_tokens: int = 1024  # tokens in an optimizer step
    micro_batch: int = 4  # sequences in a forward pass, at most; the rest is accumulated
    precision: Precision = "auto"  # auto: bfloat16 where the device is fast at it
    seed: int = 0  # of the initial weights and of the order of the text
    log_every: int = 10  # steps
    eval_every: int = 200  # steps
    eval_tokens: int = 65_536  # of the held-out text, spread evenly over it
    profile: int = 0  # steps to trace, after the first twelve; 0: none
    tensorboard: bool = False  # write what the log has for TensorBoard too

    def __post_init__(self) -> None:
        _check_positive("train", self, "steps", "batch_tokens", "micro_batch", "log_every", "eval_every", "eval_tokens")
        for name in ("seconds", "seed", "profile"):
            value = getattr(self, name)
            _check(value >= 0, f"train.{name} must not be negative, it is {value}")
        _check_choice("train", self, "precision", Precision)


@dataclass(frozen=True)
class Config:
    """All that a training run depends on, beside the text itself."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        context, tokens = self.model.context, self.train.batch_tokens
        _check(tokens % context == 0, f"train.batch_tokens ({tokens}) must be a multiple of model.context ({context})")
        for name in ("heads", "kv_heads", "hidden_dim", "context"):
            size, parts = getattr(self.model, name), self.parallel.tensor
            _check(size % parts == 0, f"model.{name} ({size}) must be a multiple of parallel.tensor ({parts})")

    @property
    def sequences(self) -> int:
        """Sequences in an optimizer step."""
        return self.train.batch_tokens // self.model.context


def load(path: str | Path, base: Config | None = None) -> Config:
    """The configuration in a TOML file; what the file doesn't set is taken from ``base``."""
    try:
        tables = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise UserError(f"can't read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); is it a TOML file?") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    return _merged(base or Config(), tables, path)


def _merged(base: Config, tables: dict[str, Any], path: str | Path) -> Config:
    sections = {}
    for section, values in tables.items():
        if section not in {f.name for f in dataclasses.fields(Config)}:
            raise UserError(f"{path}: unknown key {section!r}{did_you_mean(section, get_type_hints(Config))}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: {section} must be a table: write [{section}] above its keys")
        old = getattr(base, section)
        hints = get_type_hints(type(old))
        for key, value in values.items():
            if key not in hints:
                raise UserError(f"{path}: unknown key {key!r} in [{section}]{did_you_mean(key, hints)}")
            values[key] = _typed(value, hints[key], f"{path}: {section}.{key}")
        sections[section] = built(path, replace, old, **values)
    return built(path, replace, base, **sections)


def built(path: str | Path, make: Any, *args: Any, **kwargs: Any) -> Any:
    """``make(...)``, whose errors name the file."""
    try:
        return make(*args, **kwargs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _typed(value: Any, hint: Any, what: str) -> Any:
    """``value`` as TOML gave it, checked against the field's type."""
    if hint == tuple[str, ...]:
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise UserError(f'{what} must be a list of strings, ["a", "b"], not {value!r}')
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    wanted = hint if isinstance(hint, type) else str
    if type(value) is not wanted:  # exactly: True is no number here
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise UserError(f"{what} must be {names[wanted]}, not {value!r}")
    return value


def dump(config: Config) -> str:
    """``config`` as TOML, every key included."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines += ["", f"[{section.name}]"] if lines else [f"[{section.name}]"]
        table = dataclasses.asdict(getattr(config, section.name))
        lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


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
