"""The commands that make training data: ``fastllm data ...`` and ``fastllm tokenizer ...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
    processes: int = 0  # 0: one for each four cores; each has its share of the cores


@dataclass(frozen=True)
class TokenizerTrainArguments:
    """Train a byte-level BPE tokenizer on a corpus, or on text files and folders."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    vocab_size: int = 32768  # tokens, special ones included
    out: Path = Path("tokenizer.json")
    digits: int = 3  # digits that a token has at most
    chat: bool = True  # reserve the special tokens of a chat


@dataclass(frozen=True)
class TokenizerConvertArguments:
    """Make a tokenizer.json of a rank file of tiktoken (lines of base64 and rank)."""

    ranks: tyro.conf.Positional[Path]
    pattern: str  # how it splits text: r50k, p50k, cl100k or o200k
    out: Path = Path("tokenizer.json")


@dataclass(frozen=True)
class TokenizerInspectArguments:
    """Show how a tokenizer splits text: bytes per token by source and language, longest and unused tokens."""

    tokenizer: tyro.conf.Positional[Path]
    data: tuple[Path, ...] = ()  # a corpus, or text files and folders, to measure on; none: the vocabulary alone
    json: bool = False  # print the figures as JSON


def prepare(argv: list[str]) -> int:
    chosen = arguments.parse(PrepareArguments, "fastllm data prepare SOURCE...", argv)

    from .data.corpus.prepare import prepare
    from .data.corpus.recipe import Recipe, SourceSpec, load_recipe
    from .data.corpus.shards import read_report

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

        if not prepare_with_datatrove(recipe, chosen.out, chosen.executor, chosen.tasks, chosen.processes):
            console.say("submitted", f"{chosen.out} is complete when the last job has ended")
            return 0
        report = read_report(chosen.out)
    else:
        report = prepare(recipe, chosen.out, chosen.processes or None).report
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

    done = tokenize(chosen.corpus, chosen.tokenizer, chosen.out, chosen.processes or None)
    empty = f", {done.empty:,} without text left out" * bool(done.empty)
    console.say("tokens", f"{chosen.out}: {done.tokens:,} tokens of {done.documents:,} documents{empty}")
    return 0


def tokenizer_train(argv: list[str]) -> int:
    chosen = arguments.parse(TokenizerTrainArguments, "fastllm tokenizer train CORPUS|FILES", argv)

    from .data.tokenizer import Tokenizer

    if chosen.out.is_dir():
        raise UserError(f"{chosen.out} is a folder: --out names the file tokenizer.json")
    texts = (document["text"] for document in _documents(chosen.paths))
    tokenizer = Tokenizer.train(texts, chosen.vocab_size, digits=chosen.digits, chat=chosen.chat)
    tokenizer.save(chosen.out)
    console.say("tokenizer", f"{chosen.out}: {tokenizer.vocab_size:,} tokens")
    return 0


def tokenizer_convert(argv: list[str]) -> int:
    chosen = arguments.parse(TokenizerConvertArguments, "fastllm tokenizer convert RANKS", argv)

    from .data.tiktoken_file import convert_tiktoken

    tokenizer = convert_tiktoken(chosen.ranks, chosen.pattern)
    tokenizer.save(chosen.out)
    console.say("tokenizer", f"{chosen.out}: {tokenizer.vocab_size:,} tokens")
    return 0


def tokenizer_inspect(argv: list[str]) -> int:
    chosen = arguments.parse(TokenizerInspectArguments, "fastllm tokenizer inspect TOKENIZER", argv)

    from .data.tokenizer import Tokenizer
    from .data.tokenizer_report import inspect, render

    report = inspect(Tokenizer.load(chosen.tokenizer), _documents(chosen.data))
    if chosen.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        console.console.print(render(report))
    return 0


def _documents(paths: tuple[Path, ...]) -> Iterator[dict[str, Any]]:
    """The documents of corpora, and of files and folders in any form that is known."""
    from .data.corpus.shards import is_corpus, read_corpus
    from .data.readers import Seen, Skipped, open_source

    seen = Seen()
    for path in paths:
        if is_corpus(path):
            yield from read_corpus(path)
            continue
        for source in open_source(str(path), seen=seen):
            for record in source.records(_Warnings(source.name)):
                with suppress(Skipped):
                    yield source.extract(record).to_json()


class _Warnings:
    """A reader's log that says what is damaged."""

    def __init__(self, name: str) -> None:
        self._name = name

    def skipped(self, reason: str, n: int = 1) -> None:
        pass

    def problem(self, where: str, message: str) -> None:
        console.say("damaged", f"{self._name}, {where}: {message}")


ARGUMENTS = {
    "prepare": PrepareArguments,
    "inspect": InspectArguments,
    "tokenize": TokenizeArguments,
    "tokenizer_train": TokenizerTrainArguments,
    "tokenizer_convert": TokenizerConvertArguments,
    "tokenizer_inspect": TokenizerInspectArguments,
}
