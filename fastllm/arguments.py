"""The arguments of each command as dataclasses, parsed by tyro, and their help."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import tyro

from . import config as configs
from .errors import UserError

T = TypeVar("T")
METAVARS = {"paths": "PATH ...", "weights": "NAME=X ...", "anneal_weights": "NAME=X ..."}
WIDTH, INDENT = 110, 38  # of help: a line, and where descriptions begin


@dataclass(frozen=True)
class TrainArguments(configs.Config):
    """Train a GPT on the source of Python's standard library, or on text files and folders.

    A TOML file with the tables [model], [data], [optim] and so on may come first. Its keys are those of the options,
    which override the file; the file overrides the preset. On several GPUs or processes:
    torchrun --nproc-per-node 8 -m fastllm train [OPTIONS]
    """

    preset: str = "default"  # where the settings start from: default, or 15m to 70b (see fastllm plan)
    out: Path | None = None  # the run folder, new or empty; none: a new one under runs/
    resume: Path | None = None  # continue the run in this folder from its last checkpoint
    from_weights: bool = False  # with --resume, where the checkpoints are gone: from the weights, a fresh optimizer


@dataclass(frozen=True)
class ExportArguments:
    """Write the trained model of a run folder, or a GGUF file, as a Hugging Face folder, for transformers and vLLM."""

    run: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; none: unchanged


@dataclass(frozen=True)
class Field:
    """An option as help shows it."""

    flag: str
    metavar: str
    default: Any
    text: str


def parse(cls: type[T], prog: str, args: Sequence[str], default: T | None = None) -> T:
    """``args`` as an instance of ``cls``; tyro ends the process where they are wrong."""
    options: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(cls, prog=prog, args=list(args), **options)


def check_renamed(args: Sequence[str], renamed: dict[str, str]) -> None:
    """Raise UserError where an option has a name of an earlier version: ``renamed`` maps it to the name of today."""
    for word in args:
        name = word.split("=")[0].replace("_", "-")
        if name in renamed:
            raise UserError(f"{name} is now called {renamed[name]}")


def renamed_options() -> dict[str, str]:
    """The renamed keys of the configuration as options: ``--optim.clip`` to ``--optim.max-grad-norm``."""
    options = {}
    for old, new in configs.RENAMED.items():
        section = old.partition(".")[0]
        options[f"--{old}".replace("_", "-")] = f"--{section}.{new}".replace("_", "-")
    for old, new in configs.RENAMED_SECTIONS.items():
        for field in dataclasses.fields(getattr(configs.Config(), new)):
            options[f"--{old}.{field.name}"] = f"--{new}.{field.name}"
    return options


# ---- help ----


def fields_of(cls: Any, values: Any = None, prefix: str = "") -> Iterator[Field]:
    """The options of a dataclass, those of its sections behind ``section.``; descriptions are its comments."""
    comments, hints = _comments(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = getattr(values, field.name) if values is not None else field.default
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_of(hint, default, f"{prefix}{field.name}.")
        elif "Positional" not in str(field.type):
            flag = f"--{prefix}{field.name}".replace("_", "-")
            metavar = METAVARS.get(field.name) or _metavar(hint)
            yield Field(flag, metavar, default, comments.get(field.name, ""))


def _comments(cls: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            source = inspect.getsource(cast(Any, base))
            found |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, flags=re.M))
    return found


def _metavar(hint: Any) -> str:
    options = [h for h in get_args(hint) if h not in (type(None), ...)]
    if get_origin(hint) is Literal:
        return "|".join(options)
    if get_origin(hint) is tuple:
        return f"{_metavar(options[0])} ..."
    if type(None) in get_args(hint):
        return _metavar(options[0])
    return {int: "N", float: "X", bool: "", Path: "PATH"}.get(hint, "TEXT")


def help_text(usage: str, cls: type, fields: Sequence[Field], footer: str = "") -> str:
    """Usage, the docstring of ``cls`` and a line or two for each option."""
    lines = [f"usage: {usage}", "", inspect.cleandoc(cls.__doc__ or ""), "", "options:"]
    section = ""
    for field in fields:
        name, dot, _ = field.flag.partition(".")
        if dot and name != section:
            section = name
            lines.append("")
        head = f"  {field.flag} {field.metavar}".rstrip()
        text = field.text + _shown(field.default)
        wrapped = textwrap.wrap(text, WIDTH - INDENT) or [""]
        if len(head) >= INDENT:
            lines.append(head)
        else:
            wrapped[0] = f"{head:<{INDENT}}{wrapped[0]}"
        first, *rest = wrapped
        lines.append(first if len(head) < INDENT else " " * INDENT + first)
        lines += [" " * INDENT + line for line in rest]
    return "\n".join([*lines, *(["", footer] if footer else [])])


def _shown(default: Any) -> str:
    if default in (None, (), "", dataclasses.MISSING):
        return ""
    if isinstance(default, bool):
        return f" [{'on' if default else 'off'}]"
    return f" [{' '.join(default) if isinstance(default, tuple) else default}]"
