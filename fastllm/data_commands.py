"""The commands that make training data: ``fastllm data ...`` and ``fastllm tokenizer ...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from . import arguments, console
from .data.folders import printable
from .errors import UserError
from .input_files import one_line

if TYPE_CHECKING:
    from .data.readers import Source

DAMAGED = 1  # the exit code where all is done but for damaged input, or the filters leave nothing


@dataclass(frozen=True)
class PrepareArguments:
    """Make a corpus: clean documents without duplicates, as shards of JSON lines, with a report.

    SOURCE: files, folders, patterns ("crawl/*.warc.gz"), URLs, hf:NAME of a Hugging Face data set; or one TOML file, a
    recipe, which names sources, filters and thresholds. Formats are recognised by content: WARC and WET, MediaWiki
    dumps, EPUB and Project Gutenberg books, JSONL, Parquet, text and code; gzip, bzip2 and zstd. What was interrupted
    continues when the command is given again. Exit code: 0; 1 if places in the sources are damaged and the rest is
    done, or if the filters leave nothing; 2 for an error; 130 for Ctrl-C.
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
    partition: str = ""  # of the cluster, for slurm
    time: str = "24:00:00"  # that a task may take, for slurm
    setup: str = ""  # a command that activates the Python environment, for slurm


@dataclass(frozen=True)
class InspectArguments:
    """Show what a corpus holds, what was dropped and why, with samples."""

    corpus: tyro.conf.Positional[Path]
    samples: int = 1  # to show of each reason
    only: str = ""  # only samples of this filter, whole ("kept": of what was kept)
    json: bool = False  # print report.json


@dataclass(frozen=True)
class TokenizeArguments:
    """Encode a corpus: shards of token ids, which fastllm train --data reads.

    What was interrupted continues when the command is given again. Exit code: 0; 2 for an error, a damaged shard too
    (the others are encoded); 130 for Ctrl-C.
    """

    corpus: tyro.conf.Positional[Path]
    tokenizer: Path  # tokenizer.json in Hugging Face form
    out: Path  # the folder of the tokens, new or empty
    processes: int = 0  # 0: one for each four cores; each has its share of the cores


@dataclass(frozen=True)
class TokenizerTrainArguments:
    """Train a byte-level BPE tokenizer on a corpus, or on text files and folders.

    Exit code: 0; 1 if places in the files are damaged and the rest was read; 2 for an error; 130 for Ctrl-C.
    """

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
    """Show how a tokenizer splits text: bytes per token by source and language, longest and unused tokens.

    Exit code: as that of fastllm tokenizer train.
    """

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
        from .data.corpus.executors import SlurmOptions, prepare_with_datatrove

        slurm = SlurmOptions(chosen.partition, chosen.time, setup=chosen.setup)
        if not prepare_with_datatrove(recipe, chosen.out, chosen.executor, chosen.tasks, chosen.processes, slurm):
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

    if chosen.samples < 0:
        raise UserError("--samples must not be negative")
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
    if not chosen.paths:
        raise UserError("there is no text to train on: name a corpus, a file or a folder")
    read = _Read(chosen.paths)
    texts = (document["text"] for document in read.documents())
    tokenizer = Tokenizer.train(texts, chosen.vocab_size, digits=chosen.digits, chat=chosen.chat)
    if not read.number:
        raise UserError(f"there is no document to train on in {', '.join(map(printable, chosen.paths))}")
    tokenizer.save(chosen.out)
    few = f", not {chosen.vocab_size:,}: the text has no more to merge" * (tokenizer.vocab_size < chosen.vocab_size)
    console.say("tokenizer", f"{chosen.out}: {tokenizer.vocab_size:,} tokens{few}")
    return read.exit_code()


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

    read = _Read(chosen.data)
    report = inspect(Tokenizer.load(chosen.tokenizer), read.documents())
    if chosen.data and not read.number:
        raise UserError(f"there is no document to measure on in {', '.join(map(printable, chosen.data))}")
    if chosen.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        console.console.print(render(report))
    return read.exit_code()


class _Read:
    """The documents of corpora, and of files and folders in any form that is known. What is damaged is said.

    It is the log of the readers. ``number``: documents; ``problems``: damaged places.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths, self._name = paths, ""
        self.number = self.problems = 0

    def documents(self) -> Iterator[dict[str, Any]]:
        from .data.corpus.shards import is_corpus, read_corpus
        from .data.folders import refuse_own
        from .data.readers import Seen, open_source

        seen = Seen()
        for path in self._paths:
            if is_corpus(path):
                for document in read_corpus(path):
                    self.number += 1
                    yield document
                continue
            refuse_own(path)
            for source in open_source(str(path), seen=seen):
                self._name = printable(source.name)
                yield from self._of(source)
        if left_out := str(seen.left_out):
            self._say("left out", left_out)

    def _of(self, source: Source) -> Iterator[dict[str, Any]]:
        from .data.readers import Skipped

        try:
            for number, record in enumerate(source.records(self)):
                try:
                    document = source.extract(record)
                except Skipped as skipped:
                    if skipped.where:
                        self.problem(skipped.where, skipped.reason)
                    continue
                except Exception as error:  # of a parser: the other documents are read
                    self.problem(f"record {number:,}", f"{type(error).__name__}: {one_line(error)}")
                    continue
                self.number += 1
                yield document.to_json()
        except Exception as error:  # of a library, on damage that the reader does not know: go on with the next file
            self.problem("while reading", one_line(error) or type(error).__name__)

    def skipped(self, reason: str, n: int = 1) -> None:
        pass

    def problem(self, where: str, message: str) -> None:
        self.problems += 1
        if self.problems <= 10:
            self._say("damaged", f"{self._name}, {where}: {message}")

    def exit_code(self) -> int:
        if self.problems > 10:
            self._say("damaged", f"{self.problems:,} places in all")
        return DAMAGED if self.problems else 0

    def _say(self, label: str, text: str) -> None:
        """On standard error: the standard output may be JSON."""
        print(f"fastllm: {label}: {text}", file=sys.stderr)


ARGUMENTS = {
    "prepare": PrepareArguments,
    "inspect": InspectArguments,
    "tokenize": TokenizeArguments,
    "tokenizer_train": TokenizerTrainArguments,
    "tokenizer_convert": TokenizerConvertArguments,
    "tokenizer_inspect": TokenizerInspectArguments,
}
