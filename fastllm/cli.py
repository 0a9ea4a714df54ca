"""The command line, ``fastllm``. PyTorch is imported only by the command that needs it."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from . import __version__
from . import config as configs
from .errors import UserError, did_you_mean, pip_install
from .files import silence_stdout
from .info import EXTRAS
from .options import asks_for_help, value_of
from .planning.presets import preset

# Options that most people need; --help-all shows the others.
COMMON_TRAIN_OPTIONS = (
    "--data.paths", "--preset", "--out", "--resume",
    "--model.max-seq-len", "--model.dim", "--model.layers", "--model.heads",
    "--optim.lr", "--optim.optimizer",
    "--train.steps", "--train.seconds", "--train.global-batch-tokens", "--train.micro-batch", "--train.precision",
    "--train.eval-every", "--train.seed",
    "--spikes.policy", "--checkpoint.every",
    "--parallel.dp-replicate", "--parallel.tensor-parallel", "--parallel.activation-checkpointing",
    "--parallel.compile",
)  # fmt: skip


def train(argv: list[str]) -> int:
    from . import arguments

    # The preset and the file give the defaults of all the other options, so they are read first.
    file = argv[0] if argv and not argv[0].startswith("-") else None
    options = ["--data.paths" if word == "--data" else word for word in (argv[1:] if file else argv)]
    arguments.check_renamed(options, arguments.renamed_options())
    resumed = value_of("--resume", options)
    if resumed:
        if file or value_of("--preset", options) or value_of("--out", options):
            raise UserError("--resume has the settings and the folder of the run: leave out the file, --preset, --out")
        base = configs.load(Path(resumed, "config.toml"))
    else:
        base = preset(value_of("--preset", options) or "default")
    if file:
        base = configs.load(file, base)
    default = arguments.TrainArguments(**_fields(base))
    usage = "fastllm train [CONFIG.toml] [OPTIONS]"
    if asks_for_help(options):
        fields = list(arguments.fields_of(arguments.TrainArguments, default))
        footer = "--data PATH ... is short for --data.paths."
        if "--help-all" not in options:
            fields = [f for name in COMMON_TRAIN_OPTIONS for f in fields if f.flag == name]
            footer += f" fastllm train --help-all lists all options. Examples:\n{_examples('train')}"
        print(arguments.help_text(usage, arguments.TrainArguments, fields, footer))
        return 0
    chosen = arguments.parse(arguments.TrainArguments, f"fastllm train {file or '[CONFIG.toml]'}", options, default)

    from .training.pretrain import train

    if chosen.from_weights and not chosen.resume:
        raise UserError("--from-weights goes with --resume RUN")
    config = configs.Config(**_fields(chosen))
    resume = chosen.resume is not None
    return train(config, chosen.resume or chosen.out, resume=resume, from_weights=chosen.from_weights)


def _fields(config: configs.Config) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(configs.Config)}


def _examples(command: str) -> str:
    return "\n".join(f"  {example}" for example in COMMANDS[command].examples)


def _print_help(command: str, usage: str, cls: type) -> int:
    from . import arguments

    fields = list(arguments.fields_of(cls))
    examples = f"examples:\n{_examples(command)}"
    print(arguments.help_text(f"fastllm {command} {usage} [OPTIONS]".replace("  ", " "), cls, fields, examples))
    return 0


def sft(argv: list[str]) -> int:
    from .posttraining_commands import sft

    return sft(argv)


def align(argv: list[str]) -> int:
    from .posttraining_commands import align

    return align(argv)


def _command(module: str, command: str, usage: str) -> Callable[[list[str]], int]:
    """A command of a module such as data_commands, by the name of its function."""
    name = command.replace(" ", "_").removeprefix("data_")

    def run(argv: list[str]) -> int:
        commands = importlib.import_module(f".{module}", __package__)

        if asks_for_help(argv):
            return _print_help(command, usage, commands.ARGUMENTS[name])
        return getattr(commands, name)(argv)

    return run


def export(argv: list[str]) -> int:
    from . import arguments

    if asks_for_help(argv):
        return _print_help("export", "RUN OUT", arguments.ExportArguments)
    chosen = arguments.parse(arguments.ExportArguments, "fastllm export", argv)

    import torch

    from .huggingface.export import export

    export(chosen.run, chosen.out, dtype=chosen.dtype and getattr(torch, chosen.dtype))
    print(f"{chosen.out}: {', '.join(sorted(p.name for p in chosen.out.iterdir()))}")
    return 0


# Options of fastllm plan in earlier versions.
RENAMED_PLAN_OPTIONS = {
    "--tensor": "--tensor-parallel",
    "--replicate": "--dp-replicate",
    "--recompute": "--activation-checkpointing",
    "--context": "--max-seq-len",
}


def plan(argv: list[str]) -> int:
    from . import arguments
    from .planning.plan import PlanArguments, plan

    if asks_for_help(argv):
        return _print_help("plan", "[PRESET | CONFIG.toml]", PlanArguments)
    arguments.check_renamed(argv, RENAMED_PLAN_OPTIONS)
    return plan(arguments.parse(PlanArguments, "fastllm plan [PRESET | CONFIG.toml]", argv))


def bench(argv: list[str]) -> int:
    from .benchmarks.__main__ import main

    return main(argv)


def info(argv: list[str]) -> int:
    from .info import info

    if asks_for_help(argv):
        print("usage: fastllm info\n\nShow what this install has, what it lacks and how to get it.")
        return 0
    if argv:
        raise UserError(f"info takes no arguments, not {argv[0]!r}")
    print(info())
    return 0


@dataclass(frozen=True)
class Command:
    """A subcommand: its function, what it does in a line, examples, and whether it takes the extra "train"."""

    run: Callable[[list[str]], int]
    summary: str
    examples: tuple[str, ...]
    extra: bool = True


COMMANDS = {
    "tour": Command(
        _command("tour_commands", "tour", ""),
        "see all of it: from raw text to a chatbot, offline",
        ("fastllm tour                                   ten minutes on two CPU cores",),
    ),
    "data prepare": Command(
        _command("data_commands", "data prepare", "SOURCE..."),
        "make a corpus of crawls, dumps, books and files: clean, without duplicates",
        (
            "fastllm data prepare crawl/*.warc.gz wiki.xml.bz2 books/ --out corpus",
            "fastllm data prepare recipe.toml --out corpus  sources, filters and thresholds from a file",
        ),
    ),
    "data inspect": Command(
        _command("data_commands", "data inspect", "CORPUS"),
        "show what a corpus holds, and what was dropped and why",
        ("fastllm data inspect corpus --only gopher      samples of what one filter dropped",),
    ),
    "data tokenize": Command(
        _command("data_commands", "data tokenize", "CORPUS"),
        "encode a corpus for training",
        ("fastllm data tokenize corpus --tokenizer tokenizer.json --out tokens",),
    ),
    "tokenizer train": Command(
        _command("data_commands", "tokenizer train", "CORPUS|FILES"),
        "train a byte-level BPE tokenizer",
        ("fastllm tokenizer train corpus --vocab-size 32768 --out tokenizer.json",),
    ),
    "tokenizer convert": Command(
        _command("data_commands", "tokenizer convert", "RANKS"),
        "make a tokenizer.json of a rank file of tiktoken",
        ("fastllm tokenizer convert cl100k_base.tiktoken --pattern cl100k",),
    ),
    "tokenizer inspect": Command(
        _command("data_commands", "tokenizer inspect", "TOKENIZER"),
        "show how a tokenizer splits text",
        ("fastllm tokenizer inspect tokenizer.json --data corpus",),
    ),
    "train": Command(
        train,
        "train a GPT and write a run folder",
        (
            "fastllm train                                  on Python's standard library, in minutes on a CPU",
            "fastllm train --data book.txt notes/           on text files and folders of your own",
            "fastllm train my.toml --train.steps 500        settings from a file, and one changed",
            "fastllm train --preset 124m --out runs/gpt2    a larger model, into a named folder",
            "fastllm train --resume runs/gpt2               continue from its last checkpoint",
            "torchrun --nproc-per-node 8 -m fastllm train   on eight GPUs",
        ),
    ),
    "sft": Command(
        sft,
        "teach a model to chat, on conversations",
        (
            "fastllm sft runs/gpt2 --data chats.jsonl --out runs/chat",
            "fastllm sft model.gguf --data chats.jsonl --lora.rank 16",
        ),
    ),
    "align": Command(
        align,
        "align a model with preferences (dpo …) or rewards (grpo)",
        (
            "fastllm align runs/chat --method dpo --data pairs.jsonl",
            "fastllm align runs/chat --method grpo --data q.jsonl --grpo.reward rewards.py:right",
        ),
    ),
    "report": Command(
        _command("training_commands", "report", "RUN"),
        "show how a run went, and its scores",
        ("fastllm report runs/gpt2                       report.md and loss.png, of a run that goes on too",),
    ),
    "generate": Command(
        _command("inference_commands", "generate", "MODEL"),
        "continue a text, or a file of prompts",
        (
            'fastllm generate runs/gpt2 --prompt "def "',
            "fastllm generate model.gguf --prompts in.jsonl --out out.jsonl",
        ),
    ),
    "chat": Command(
        _command("inference_commands", "chat", "MODEL"),
        "chat with a model in the terminal",
        ("fastllm chat model.gguf                        a run, Hugging Face folder or GGUF file",),
    ),
    "serve": Command(
        _command("serving_commands", "serve", "MODEL"),
        "serve a model by OpenAI's API, with a chat page",
        ("fastllm serve SmolLM2-135M-Instruct.Q4_1.gguf  at http://127.0.0.1:8000",),
    ),
    "eval": Command(
        _command("evaluation_commands", "eval", "MODEL"),
        "score a model on MMLU and other tasks, or on text",
        (
            "fastllm eval model.gguf --tasks mmlu hellaswag --out results.json",
            "fastllm eval runs/gpt2 --text book.txt          bits per byte",
        ),
    ),
    "export": Command(
        export,
        "write a trained model as a Hugging Face folder",
        ("fastllm export runs/gpt2 gpt2-hf --dtype bfloat16",),
    ),
    "plan": Command(
        plan,
        "show what a run takes: settings, memory, time and cost",
        (
            "fastllm plan                                   all presets, 15m to 70b",
            "fastllm plan 1.5b --gpus 8                     one of them on eight GPUs",
            "fastllm plan --params 3e9 --out 3b.toml        of a size; a file for fastllm train",
        ),
    ),
    "bench": Command(
        bench,
        "measure the kernels and the training step on this machine, against PyTorch",
        ("fastllm bench --quick                          two minutes on two CPU cores",),
    ),
    "info": Command(
        info,
        "show what this install has and lacks, for a bug report",
        ("fastllm info                                   versions, backends, processor and GPU",),
        extra=False,
    ),
}


def usage(group: str = "") -> str:
    """Help on all commands, or on those of a group."""
    commands = {name: command for name, command in COMMANDS.items() if name.startswith(group)}
    words = f"{group}COMMAND" if group else "COMMAND"
    lines = [f"usage: fastllm {words} [OPTIONS]", "", "Train a GPT on fused kernels, and use it.", "", "commands:"]
    lines += [f"  {name:<18} {command.summary}" for name, command in commands.items()]
    lines += ["", "examples:", *(f"  {example}" for command in commands.values() for example in command.examples)]
    lines += ["", "fastllm COMMAND --help shows its options; fastllm --version the version."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a command. The exit code: 0, 2 for an error that the message explains, 128 + n if signal n ended it."""
    try:
        try:
            code = _run(sys.argv[1:] if argv is None else argv)
        except SystemExit:  # of tyro and argparse, after what they printed
            _flush()
            raise
        _flush()
        return code
    except UserError as error:
        return _fail(f"error: {error}")
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        silence_stdout()
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else "can't write to standard output: "
        known = error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
        return _fail(f"error: {where if known else ''}{error.strerror or error}")
    except UnicodeEncodeError as error:
        return _fail(f"error: standard output can't show the text in {error.encoding}; set PYTHONIOENCODING=utf-8")
    except MemoryError:
        return _fail("error: not enough memory")
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"fastllm {__version__}")
        return 0
    name, options = argv[0], argv[1:]
    group = [known.partition(" ")[2] for known in COMMANDS if known.startswith(f"{name} ")]
    if group:
        if not options or options[0] in ("-h", "--help", "help"):
            print(usage(f"{name} "))
            return 0
        if options[0] not in group:
            raise UserError(f"unknown command {name} {options[0]!r}{did_you_mean(options[0], group)}")
        name, options = f"{name} {options[0]}", options[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(name, {known.split()[0] for known in COMMANDS})}")
    command = COMMANDS[name]
    missing = [name for name in EXTRAS["train"] if importlib.util.find_spec(name) is None]
    if command.extra and missing:
        raise UserError(f"{', '.join(missing)} not installed: {pip_install('train')}")
    if command.extra:  # fastllm info says so in its report
        _check_backend()
    try:
        return command.run(options)
    except SystemExit as end:  # help and mistakes, of the parsers; other ranks, where rank 0 says why
        return end.code if isinstance(end.code, int) else 0


def _check_backend() -> None:
    """Raise UserError where FASTLLM_BACKEND names no backend, which would fail the import of the kernels."""
    if os.environ.get("FASTLLM_BACKEND") and importlib.util.find_spec("torch") is not None:
        try:
            from . import kernels  # noqa: F401
        except ValueError as error:
            raise UserError(str(error)) from None


def _flush() -> None:
    if sys.stdout is not None:  # it is None where the shell closed it
        sys.stdout.flush()


def _fail(message: str, code: int = 2) -> int:
    """Write a line to stderr, whatever state the output is in."""
    try:
        _flush()
    except (OSError, ValueError):
        silence_stdout()
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.splitlines()))
    with suppress(OSError):
        print(f"fastllm: {line}", file=sys.stderr)
    return code
