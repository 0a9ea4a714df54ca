"""The commands that tune a model: ``fastllm sft`` and ``fastllm align``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from . import arguments
from . import config as configs
from .errors import UserError, did_you_mean
from .options import asks_for_help, value_of
from .posttraining.config import (
    BaseConfig,
    GrpoSections,
    PreferenceConfig,
    PreferenceSections,
    RewardConfig,
    SftConfig,
    SftSections,
    TuneConfig,
)

METHODS = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "grpo")
LORA_LR = 10  # times the usual learning rate for adapters

COMMON = (
    "--data.paths", "--out", "--resume", "--data.eval-paths", "--data.weights", "--data.max-seq-len",
    "--data.chat-template", "--lora.rank", "--lora.dora", "--optim.lr", "--train.epochs", "--train.steps",
    "--train.batch-size", "--train.micro-batch", "--train.precision", "--train.eval-every", "--train.seed",
)  # fmt: skip
# Options of the methods that most people need, beside those of COMMON.
COMMON_SFT = ("--teacher.path", "--teacher.weight")
COMMON_PREFERENCES = ("--preferences.beta", "--preferences.label-smoothing")
COMMON_GRPO = (
    "--grpo.reward", "--grpo.variant", "--grpo.group", "--grpo.updates", "--grpo.max-tokens", "--grpo.temperature",
    "--grpo.kl",
)  # fmt: skip


@dataclass(frozen=True)
class SftArguments(SftSections):
    """Teach a model to chat: train it on conversations, and of these on the assistant's turns alone.

    MODEL is a run folder of fastllm train, a Hugging Face folder, or a GGUF file. A line of the data is an object with
    "messages" (or ShareGPT's "conversations", or Alpaca's "instruction" and "output").
    """

    model: tyro.conf.Positional[Path | None] = None
    out: Path | None = None  # the run folder, new or empty; none: a new one under runs/
    resume: Path | None = None  # continue the run in this folder from its last checkpoint


@dataclass(frozen=True)
class PreferenceArguments(PreferenceSections):
    """Align a model with preferences, or with rewards that a function computes.

    MODEL is a run folder, a Hugging Face folder, or a GGUF file. A line of the data is an object with "prompt",
    "chosen" and "rejected"; for kto also with "prompt", "completion" and "label"; for grpo with "prompt" and whatever
    the reward function wants to know.
    """

    model: tyro.conf.Positional[Path | None] = None
    method: Literal["dpo", "ipo", "kto", "orpo", "simpo", "cpo"] = "dpo"  # dpo, ipo, kto, orpo, simpo, cpo or grpo
    out: Path | None = None  # the run folder, new or empty; none: a new one under runs/
    resume: Path | None = None  # continue the run in this folder from its last checkpoint


@dataclass(frozen=True)
class RewardArguments(GrpoSections):
    """Align a model by reinforcement learning with rewards that a function computes.

    MODEL is a run folder, a Hugging Face folder, or a GGUF file. A line of the data is an object with "prompt" and
    whatever the reward function wants to know. It is called as reward(prompt, completion, **others), and returns a
    number; prompt is a list of messages.
    """

    model: tyro.conf.Positional[Path | None] = None
    method: Literal["grpo"] = "grpo"  # dpo, ipo, kto, orpo, simpo, cpo or grpo
    out: Path | None = None  # the run folder, new or empty; none: a new one under runs/
    resume: Path | None = None  # continue the run in this folder from its last checkpoint


def sft(argv: list[str]) -> int:
    from .posttraining.sft import Sft

    return _tune("sft", argv, SftArguments, SftConfig, COMMON_SFT, Sft, "sft")


def align(argv: list[str]) -> int:
    method = value_of("--method", argv)
    resumed = value_of("--resume", argv)
    if resumed and method is None:
        method = _method_of(resumed, "align")
    method = "dpo" if method is None else method
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}{did_you_mean(method, METHODS)}")
    if method == "grpo":
        from .posttraining.grpo import Grpo

        return _tune("align", argv, RewardArguments, RewardConfig, ("--method", *COMMON_GRPO), Grpo, method)
    from .posttraining.preferences import Preferences

    common = ("--method", *COMMON_PREFERENCES)
    return _tune("align", argv, PreferenceArguments, PreferenceConfig, common, Preferences, method)


def _method_of(run: str, command: str, method: str | None = None) -> str:
    """The method of a run; UserError where it is one of another command or, where one is given, of another method."""
    base = configs.read_toml(Path(run, "config.toml")).get("base", {})
    found = base.get("method") if isinstance(base, dict) else None
    known = "align" if found in METHODS else "sft" if found == "sft" else "train"
    if known != command or method not in (None, found):
        name = f"{known} --method {found}" if known == "align" else known
        raise UserError(f"{run} is a run of fastllm {name}: continue it with that command")
    return str(found)


def _tune(
    command: str, argv: list[str], cls: Any, config_cls: Any, common: Sequence[str], make: Any, method: str
) -> int:
    options = ["--data.paths" if word == "--data" else word for word in argv]
    resumed = value_of("--resume", options)
    base: TuneConfig = config_cls()
    if resumed:
        _method_of(resumed, command, method)
        path = Path(resumed, "config.toml")
        base = configs.merged(base, configs.read_toml(path), path)
    sections = [f.name for f in dataclasses.fields(config_cls) if f.name not in ("model", "base")]
    default = cls(**{name: getattr(base, name) for name in sections})
    usage = f"fastllm {command} MODEL" + (f" --method {method}" if command == "align" else "")
    if asks_for_help(options):
        fields = list(arguments.fields_of(cls, default))
        footer = "--data PATH ... is short for --data.paths."
        if "--help-all" not in options:
            fields = [f for name in (*COMMON[:3], *common, *COMMON[3:]) for f in fields if f.flag == name]
            footer += f" fastllm {command} --help-all lists all options."
            if command == "align":
                footer += "\nThose of grpo: fastllm align --method grpo --help."
        print(arguments.help_text(f"{usage} --data FILE ... [OPTIONS]", cls, fields, footer))
        return 0
    chosen = arguments.parse(cls, usage, options, default)
    if resumed and (chosen.model or chosen.out):
        raise UserError("--resume has the model and the folder of the run: leave out MODEL and --out")
    if not resumed and chosen.model is None:
        raise UserError(f"which model? fastllm {command} MODEL --data FILE ...")
    model = base.base.path if resumed else str(chosen.model)
    config = config_cls(
        **{name: getattr(chosen, name) for name in sections}, base=BaseConfig(model, method), model=base.model
    )
    if config.lora.rank and not resumed and value_of("--optim.lr", options) is None:
        config = replace(config, optim=replace(config.optim, lr=LORA_LR * config.optim.lr))

    from .posttraining.run import tune

    return tune(make(), config, chosen.resume or chosen.out, resume=chosen.resume is not None)
