"""The command line, ``fastllm``. PyTorch is imported only by the command that needs it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from . import __version__
from . import config as configs
from .errors import UserError, did_you_mean
from .planning.presets import preset

NEEDED = ("matplotlib", "numpy", "rich", "safetensors", "tokenizers", "tyro")  # the extra "train"


@dataclass(frozen=True)
class TrainArguments(configs.Config):
    """Train a GPT, on the source of Python's standard library or on text of your own.

    A TOML file with the tables [model], [data], [optim] and so on may come first:
    fastllm train CONFIG.toml [OPTIONS]. Its keys are those of the options below, which have
    precedence over the file, as the file has over the preset. In several processes:
    torchrun --nproc-per-node 8 -m fastllm train [OPTIONS].
    """

    preset: str = "default"  # where the settings start from: default, or 15m to 70b as fastllm plan lists them
    out: Path | None = None  # the run folder, new or empty; None: a new one under runs/
    resume: Path | None = None  # go on with the run in this folder, from its last checkpoint


def train(argv: list[str]) -> int:
    import tyro

    # The preset and the file give the defaults of all the other options, so they are read first.
    file = argv[0] if argv and not argv[0].startswith("-") else None
    options = argv[1:] if file else argv
    resumed = _value_of("--resume", options)
    if resumed:
        if file or _value_of("--preset", options) or _value_of("--out", options):
            raise UserError("--resume has the settings and the folder of the run: leave out the file, --preset, --out")
        base = configs.load(Path(resumed, "config.toml"))
    else:
        base = preset(_value_of("--preset", options) or "default")
    if file:
        base = configs.load(file, base)
    arguments = tyro.cli(
        TrainArguments,
        prog=f"fastllm train {file or '[CONFIG.toml]'}",
        args=["--data.paths" if word == "--data" else word for word in options],
        default=TrainArguments(**_fields(base)),
    )

    from .training.pretrain import train

    config = configs.Config(**_fields(arguments))
    return train(config, arguments.resume or arguments.out, resume=arguments.resume is not None)


def _fields(config: configs.Config) -> dict[str, object]:
    return {f.name: getattr(config, f.name) for f in fields(configs.Config)}


def _value_of(option: str, argv: list[str]) -> str | None:
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.removeprefix(option + "=")
    return None


def generate(argv: list[str]) -> int:
    import tyro

    return tyro.cli(_generate, prog="fastllm generate", args=argv)


def _generate(
    run: Path,
    /,
    prompt: str = "",
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> int:
    """Print text from a trained model, as it comes.

    Args:
        run: the run folder that `fastllm train` made, or a Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3.
        prompt: the text to go on from.
        max_tokens: end after this many tokens, if the model doesn't end the text before.
        temperature: below 1 the likely tokens get likelier; 0 takes the likeliest each time.
        top_k: choose among this many tokens; 0: all.
        top_p: choose among the likeliest tokens that make up this probability.
        seed: the same seed gives the same text.
    """
    for name, ok, rule in (
        ("max-tokens", max_tokens > 0, "be greater than 0"),
        ("temperature", temperature >= 0, "not be negative"),
        ("top-k", top_k >= 0, "not be negative"),
        ("top-p", 0 < top_p <= 1, "be greater than 0 and at most 1"),
        ("seed", seed >= 0, "not be negative"),
    ):
        if not ok:
            raise UserError(f"--{name} must {rule}")

    import torch

    from .inference.generate import generate
    from .inference.load import load_run

    model, tokenizer, meta = load_run(run, "cuda" if torch.cuda.is_available() else "cpu")
    if meta.get("status") != "finished":
        early = f"ended early, at step {meta.get('step')} of {meta.get('steps')}"
        print(f"fastllm: note: this run {early}", file=sys.stderr)
    if len(tokenizer.encode(prompt)) > model.config.context:
        print(f"fastllm: note: the model sees the last {model.config.context} tokens of the prompt", file=sys.stderr)
    print(prompt, end="", flush=True)
    for piece in generate(
        model, tokenizer, prompt,
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    ):  # fmt: skip
        print(piece, end="", flush=True)
    print()
    return 0


def export(argv: list[str]) -> int:
    import tyro

    return tyro.cli(_export, prog="fastllm export", args=argv)


def _export(run: Path, out: Path, /, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> int:
    """Write a trained model as a Hugging Face folder, for transformers and vLLM.

    Args:
        run: the run folder that `fastllm train` made.
        out: the folder to make.
        dtype: of the weights; None: as they are.
    """
    import torch

    from .huggingface.export import export

    export(run, out, dtype=dtype and getattr(torch, dtype))
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    return 0


def plan(argv: list[str]) -> int:
    import tyro

    from .planning.plan import PlanArguments, plan

    # The preset or file stands first, without the name of an option.
    named = argv and not argv[0].startswith("-")
    return plan(
        tyro.cli(PlanArguments, prog="fastllm plan [PRESET|FILE.toml]", args=["--what", *argv] if named else argv)
    )


def bench(argv: list[str]) -> int:
    from .benchmarks.__main__ import main

    return main(argv)


@dataclass(frozen=True)
class Command:
    """A subcommand: the function that takes its arguments, what it does in a line, and examples."""

    run: Callable[[list[str]], int]
    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "train": Command(
        train,
        "train a GPT and write a run folder",
        (
            "fastllm train                                  on Python's standard library, in minutes on a CPU",
            "fastllm train --data book.txt notes/           on text files and folders of your own",
            "fastllm train my.toml --train.steps 500        settings from a file, and one changed",
            "fastllm train --preset 124m --out runs/gpt2    a larger model, into a named folder",
            "fastllm train --resume runs/gpt2               go on from its last checkpoint",
            "torchrun --nproc-per-node 8 -m fastllm train   on eight GPUs",
        ),
    ),
    "generate": Command(
        generate,
        "print text from a trained model",
        ('fastllm generate runs/gpt2 --prompt "def "',),
    ),
    "export": Command(
        export,
        "write a trained model as a Hugging Face folder",
        ("fastllm export runs/gpt2 gpt2-hf --dtype bfloat16",),
    ),
    "plan": Command(
        plan,
        "tell what a run will take: settings, memory, time and money",
        (
            "fastllm plan                                   all presets, 15m to 70b",
            "fastllm plan 1.5b --gpus 8                     one of them on eight GPUs",
            "fastllm plan --params 3e9 --out 3b.toml        of a size; a file for fastllm train",
        ),
    ),
    "bench": Command(
        bench,
        "measure the kernels and the training step on this machine, beside PyTorch",
        ("fastllm bench --quick                          two minutes on two CPU cores",),
    ),
}


def usage() -> str:
    lines = ["usage: fastllm COMMAND [OPTIONS]", "", "Train a GPT on fused kernels, and use it.", "", "commands:"]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "examples:", *(f"  {example}" for command in COMMANDS.values() for example in command.examples)]
    lines += ["", "fastllm COMMAND --help lists a command's options; fastllm --version tells the version."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code (0 well, 2 an error that the message explains, 128 + n ended by signal n)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"fastllm {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}")
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f'{", ".join(missing)} not installed: pip install "fastllm[train]"')
        return COMMANDS[argv[0]].run(argv[1:])
    except UserError as error:
        print(f"fastllm: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("fastllm: interrupted", file=sys.stderr)
        return 130
