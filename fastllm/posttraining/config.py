"""The settings of post-training: what each method adds to the sections of every run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..config import (
    CheckpointConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SpikeConfig,
    check,
    check_positive,
)
from .losses import PreferenceOptions


@dataclass(frozen=True)
class ChatDataConfig:
    """What is trained on."""

    paths: tuple[str, ...] = ()  # JSON lines or Parquet files, or folders of them (--data)
    weights: tuple[str, ...] = ()  # NAME=WEIGHT of each file; none: every row once an epoch
    eval_paths: tuple[str, ...] = ()  # files to evaluate on; none: a share of the data
    validation: float = 0.05  # that share
    max_seq_len: int = 0  # tokens of a sequence at most; 0: what the model sees, at most 2048
    chat_template: str = ""  # a file with a Jinja template; none: the model's own, or ChatML
    new_tokens: tuple[str, ...] = ()  # special tokens to add to the vocabulary

    def __post_init__(self) -> None:
        check(0 <= self.validation < 1, f"data.validation must be at least 0 and below 1, it is {self.validation}")
        check(self.max_seq_len >= 0, f"data.max_seq_len must not be negative, it is {self.max_seq_len}")


@dataclass(frozen=True)
class TuneLoopConfig(LoopConfig):
    """The training loop."""

    steps: int = 1_000_000  # optimizer steps at most, where train.epochs are more
    eval_every: int = 50  # steps between evaluations
    epochs: float = 2.0  # times that the data is read
    batch_size: int = 16  # items of an optimizer step, over all ranks: packed sequences, pairs, or prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("train", self, "epochs", "batch_size")


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the layers of a block


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by the library peft. The base stays as it is."""

    rank: int = 0  # of the adapters; 0: all weights are trained
    alpha: float = 0.0  # the adapters' output is multiplied by alpha / rank; 0: alpha is twice the rank
    dropout: float = 0.0  # of the adapters' input
    dora: bool = False  # learn the magnitude of each weight column apart (DoRA, arXiv:2402.09353)
    targets: tuple[str, ...] = LINEAR  # the layers that get one

    def __post_init__(self) -> None:
        check(self.rank >= 0, f"lora.rank must not be negative, it is {self.rank}")
        check(self.alpha >= 0 and math.isfinite(self.alpha), f"lora.alpha must not be negative, it is {self.alpha}")
        check(0 <= self.dropout < 1, f"lora.dropout must be at least 0 and below 1, it is {self.dropout}")
        check(bool(self.rank) or not self.dora, "lora.dora needs a lora.rank")
        unknown = [name for name in self.targets if name not in LINEAR]
        check(not unknown, f"lora.targets has {', '.join(unknown)}; choose from {', '.join(LINEAR)}")
        check(bool(self.targets), "lora.targets names no layer")


@dataclass(frozen=True)
class TeacherConfig:
    """Distillation: learn from a larger model too (Agarwal et al. 2023, arXiv:2306.13649)."""

    path: str = ""  # a model with the same tokenizer; none: no distillation
    weight: float = 0.5  # share of the distillation loss; the rest is the cross-entropy's
    beta: float = 0.0  # 0: KL(teacher | student), 1: KL(student | teacher), between: their Jensen-Shannon divergence
    temperature: float = 1.0  # divides the logits of both

    def __post_init__(self) -> None:
        check(0 <= self.weight <= 1, f"teacher.weight must be from 0 to 1, it is {self.weight}")
        check(0 <= self.beta <= 1, f"teacher.beta must be from 0 to 1, it is {self.beta}")
        check_positive("teacher", self, "temperature")


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimization (Shao et al. 2024, arXiv:2402.03300)."""

    reward: str = ""  # MODULE:FUNCTION or FILE.py:FUNCTION
    variant: str = "grpo"  # grpo; dr_grpo: no bias by length or spread; dapo: by token, clip-higher, groups that differ
    group: int = 8  # completions of each prompt
    updates: int = 1  # optimizer steps for each rollout, over as many batches of prompts
    max_tokens: int = 256  # of a completion
    temperature: float = 1.0  # of sampling, and of the policy that is trained
    clip_low: float = 0.2  # the ratio of new to old probabilities counts down to 1 less this
    clip_high: float = 0.0  # and up to 1 more this; 0: clip_low, of dapo 0.28
    kl: float = 0.0  # weight of the KL divergence to the model that training began with; 0: it is not kept
    train_truncated: bool = False  # learn from completions that max_tokens cut off too
    reward_seconds: float = 10.0  # that the reward of a completion may take
    reward_workers: int = 2  # processes that compute rewards
    eval_prompts: int = 64  # prompts of an evaluation

    def __post_init__(self) -> None:
        check(
            self.variant in ("grpo", "dr_grpo", "dapo"),
            f"grpo.variant must be one of grpo, dr_grpo, dapo, it is {self.variant!r}",
        )
        check(self.group >= 2, f"grpo.group must be at least 2, it is {self.group}")
        names = ("updates", "max_tokens", "temperature", "reward_seconds", "reward_workers", "eval_prompts")
        check_positive("grpo", self, *names)
        for name in ("clip_low", "clip_high", "kl"):
            check(getattr(self, name) >= 0, f"grpo.{name} must not be negative, it is {getattr(self, name)}")
        check(self.clip_low < 1, f"grpo.clip_low must be below 1, it is {self.clip_low}")


@dataclass(frozen=True)
class TuneSections:
    """What the methods have in common."""

    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-5, schedule="linear", warmup_ratio=0.05, weight_decay=0.0)
    )
    train: TuneLoopConfig = field(default_factory=TuneLoopConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check(
            not self.lora.rank or self.parallel.tensor_parallel == 1,
            "lora.rank and parallel.tensor_parallel exclude each other: adapters are small, leave one out",
        )
        check(not self.lora.rank or not self.data.new_tokens, "data.new_tokens needs training without lora.rank")

    @property
    def items_per_step(self) -> int:
        """Items of the data source in an optimizer step, over all ranks."""
        return self.train.batch_size


@dataclass(frozen=True)
class SftSections(TuneSections):
    """Supervised fine-tuning."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)


@dataclass(frozen=True)
class PreferenceSections(TuneSections):
    """Preference optimization."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-6, schedule="linear", warmup_ratio=0.1, weight_decay=0.0)
    )
    preferences: PreferenceOptions = field(default_factory=PreferenceOptions)


@dataclass(frozen=True)
class GrpoSections(TuneSections):
    """Reinforcement learning."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-6, schedule="linear", warmup_ratio=0.05, weight_decay=0.0)
    )
    grpo: GrpoConfig = field(default_factory=GrpoConfig)


@dataclass(frozen=True)
class BaseConfig:
    """The model that training began with."""

    path: str = ""
    method: str = ""


@dataclass(frozen=True)
class TuneConfig(TuneSections):
    """All that a run depends on, as its config.toml has it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    base: BaseConfig = field(default_factory=BaseConfig)


@dataclass(frozen=True)
class SftConfig(SftSections, TuneConfig):
    """Of a run of supervised fine-tuning."""


@dataclass(frozen=True)
class PreferenceConfig(PreferenceSections, TuneConfig):
    """Of a run of preference optimization."""


@dataclass(frozen=True)
class RewardConfig(GrpoSections, TuneConfig):
    """Of a run of reinforcement learning."""
