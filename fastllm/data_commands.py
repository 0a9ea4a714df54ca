"""The commands that make training data: ``fastllm data ...`` and ``fastllm tokenizer ...``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from . import arguments, console
from .errors import UserError

DAMAGED = 1  # the exit code where all is done but for damaged input, or nothing is left


@dataclass(frozen=True)
class PrepareArguments:
    """Make a corpus: clean documents without duplicates, as shards of JSON lines, with a report.

    SOURCE: files, folders, patterns ("crawl/*.warc.gz"), URLs, hf:NAME of a Hugging Face data set; or one TOML file, a
    recipe, which names sources, filters and thresholds. Formats are recognised by content: WARC and WET, MediaWiki
    dumps, EPUB and Project Gutenberg books, JSONL, Parquet, text and code; gzip, bzip2 and zstd. What was interrupted
    continues when the command is given again.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    out: Path  # the folder of the corpus, new or empty
    text_column: str = "text"  # of JSONL and Parquet
    languages: tuple[str, ...] = ()  # keep these languages alone (ISO 639-1: en de zh); none: keep all
    without: tuple[str, ...] = ()  # filters to leave out, by name: gopher c4 fineweb near_duplicates …
    decontaminate: tuple[Path, ...] = ()  # files of evaluations whose text must not be in the corpus
    processes: int = 0  # that clean documents; 0: one for each core
    executor: Literal["processes", "local", "slurm", "ray"] = "processes"  # the last three are datatrove's
    tasks: int = 0  # of a datatrove executor; 0: one for each file


@dataclass(frozen=True)
class InspectArguments:
    """Show what a corpus holds, what was dropped and why, with samples."""

    corpus: tyro.conf.Positional[Path]
    samples: int = 1  # to show of each reason
    only: str = ""  # only samples of this filter, whole ("kept": of what was kept)
    json: bool = False  # print report.json


@dataclass(frozen=True)
class TokenizeArguments:
    """Encode a corpus: memory-mapped shards of token ids, which fastllm train --data reads.

    What was interrupted continues when the command is given again.
    """

    corpus: tyro.conf.Positional[Path]
    tokenizer: Path  # tokenizer.json in Hugging Face form
    out: Path  # the folder of the tokens, new or empty
    processes: int = 0  # 0: one for each core


@dataclass(frozen=True)
class TokenizerTrainArguments:
    """Train a byte-level BPE tokenizer on a corpus, or on text files and folders."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    vocab_size: int = 32768  # tokens, special ones included
    out: Path = Path("tokenizer.json")
    digits: int = 3  # digits that a token has at most
    chat: bool = True  # reserve the special tokens of a chat


@dataclass(frozen=True)
class TokenizerInspectArguments:
    """Show how a tokenizer splits text: bytes per token by source and language, longest and unused tokens."""

    tokenizer: tyro.conf.Positional[Path]
    data: tuple[Path, ...] = ()  # a corpus, or text files and folders, to measure on; none: the Zen of Python
    json: bool = False  # print the figures as JSON


def prepare(argv: list[str]) -> int:
    chosen = arguments.parse(PrepareArguments, "fastllm data prepare SOURCE...", argv)

    from .data.corpus.prepare import prepare
    from .data.corpus.recipe import Recipe, SourceSpec, load_recipe

    if any(source.endswith(".toml") for source in chosen.sources):
        if len(chosen.sources) > 1:
            raise UserError("a recipe names all sources: give one TOML file alone")
        recipe = load_recipe(chosen.sources[0])
    else:
        recipe = Recipe(tuple(map(SourceSpec, dict.fromkeys(chosen.sources))))
    filters = dict(recipe.filters)
    if chosen.languages:
        filters["language"] = replace(filters["language"], languages=chosen.languages)
    if chosen.text_column != "text":
        recipe = replace(recipe, readers=replace(recipe.readers, text_column=chosen.text_column))
    if chosen.decontaminate:
        recipe = replace(
            recipe, decontamination=replace(recipe.decontamination, files=tuple(map(str, chosen.decontaminate)))
        )
    recipe = replace(recipe, filters=filters).without(chosen.without)
    if chosen.executor != "processes":
        from .data.corpus.executors import prepare_with_datatrove

        return prepare_with_datatrove(recipe, chosen.out, chosen.executor, chosen.tasks, chosen.processes)
    outcome = prepare(recipe, chosen.out, chosen.processes or None)
    report = outcome.report
    console.say(
        "corpus",
        f"{chosen.out}: {report['documents']:,} documents of {report['read'][0]:,}, "
        f"{report['characters'] / 1e6:,.1f}M characters, in {report['seconds']:,.0f} s",
    )
    for entry in report["damage"][:10]:
        console.say("damaged", f"{entry['where']}: {entry['message']}")
    if report["problems"]:
        console.say("", f"{report['problems']:,} damaged places in all; {chosen.out / 'report.md'} lists them")
    if not report["documents"]:
        print("fastllm: nothing is left: fastllm data inspect shows what was dropped and why", file=sys.stderr)
    console.say("look", f"fastllm data inspect {chosen.out}")
    return DAMAGED if report["problems"] or not report["documents"] else 0


def inspect(argv: list[str]) -> int:
    chosen = arguments.parse(InspectArguments, "fastllm data inspect CORPUS", argv)

    from .data.corpus.inspect import inspect
    from .data.corpus.shards import read_report

    if chosen.json:
        print(json.dumps(read_report(chosen.corpus), ensure_ascii=False))
    else:
        console.console.print(inspect(chosen.corpus, chosen.samples, chosen.only))
    return 0


def tokenize(argv: list[str]) -> int:
    chosen = arguments.parse(TokenizeArguments, "fastllm data tokenize CORPUS", argv)

    from .data.tokenize import tokenize

    tokenize(chosen.corpus, chosen.tokenizer, chosen.out, chosen.processes or None)
    return 0


ARGUMENTS = {
    "prepare": PrepareArguments,
    "inspect": InspectArguments,
    "tokenize": TokenizeArguments,
    "tokenizer_train": TokenizerTrainArguments,
    "tokenizer_inspect": TokenizerInspectArguments,
}
