"""From a corpus to a folder of tokens, in parallel processes; what was interrupted continues."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import console
from ..errors import UserError
from ..files import write_atomic
from ..input_files import one_line, read_json, shown
from ..run_lock import LOCK, run_lock
from .corpus.shards import read_report, read_shard
from .progress import progress
from .token_shards import (
    INDEX,
    INDEX_LIMIT,
    SHARD_TOKENS,
    TOKENIZER,
    Shard,
    ShardWriter,
    TokenFolder,
    document_key,
    write_index,
)
from .tokenizer import Tokenizer
from .workers import end_with_parent, starting

WORK, PLAN = "work", "plan.json"
# Characters in a task: what is lost of an interrupted one is done again. A large corpus has so few shards of tokens.
TASKS, TASK_LIMIT = 256, 2**28
# The library's threads are as fast as processes, and share the work evenly at its end. But what Python does for each
# document takes 5 % of a core's time, so that many threads would wait for it.
THREADS = 4
ALONE = 2**23  # characters that the first process encodes by itself before others have started


@dataclass(frozen=True)
class Tokenized:
    """What was written. ``empty``: documents without text, which are left out."""

    documents: int
    tokens: int
    empty: int


@dataclass(frozen=True)
class _Task:
    """Consecutive shards of the corpus, which become a shard of tokens, or several where it would be too large."""

    number: int
    corpus: Path
    inputs: tuple[dict[str, Any], ...]  # shards as report.json lists them
    out: Path
    shard_tokens: int

    @property
    def record(self) -> Path:
        """Written when the task is done."""
        return self.out / WORK / f"{self.number:05d}.json"


def tokenize(
    corpus: str | Path,
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    processes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Tokenized:
    """Encode the documents of a corpus into the folder of tokens ``out``.

    The tokens do not depend on ``processes``. What was interrupted continues; what is finished is not done again.
    Where shards of the corpus are damaged, the others are encoded, and a rerun continues with the damaged ones.

    Args:
        corpus: the folder that ``fastllm data prepare`` wrote.
        tokenizer: a tokenizer, or its tokenizer.json.
        out: the folder, new, empty, or of an earlier call with the same corpus and tokenizer.
        processes: how many encode, each on its share of the cores by threads; None: one for each THREADS cores.
        shard_tokens: a shard of tokens ends with the document that reaches this.

    Raises:
        UserError: corpus or tokenizer can't be used, ``out`` holds something else or can't be written to.
    """
    corpus, out = Path(corpus), Path(out)
    cores = len(os.sched_getaffinity(0))
    if processes is not None and not 0 < processes <= 4 * cores:
        raise UserError(f"--processes must be from 1 to {4 * cores} on {cores} cores, it is {processes}")
    report = read_report(corpus)
    if not report["shards"]:
        raise UserError(f"{corpus}: there is no document with text: fastllm data inspect shows what was dropped")
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    plan = {
        "corpus": [[shard["name"], shard["sha256"]] for shard in report["shards"]],
        "tokenizer": hashlib.sha256(f"{tokenizer.eos_id} {tokenizer.backend.to_str()}".encode()).hexdigest(),
        "shard_tokens": shard_tokens,
    }
    if _is_finished(out, plan):
        console.say("tokens", f"{out} is complete already; remove it to encode the corpus again")
        shutil.rmtree(out / WORK, ignore_errors=True)  # of a process that was killed at its end
        folder = TokenFolder(out)
        return Tokenized(folder.documents, folder.tokens, read_json(out / INDEX, INDEX_LIMIT)["empty"])
    tasks = _tasks(corpus, report["shards"], out, shard_tokens)
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't use the folder {out}: {error.strerror}") from None
    with run_lock(out, "tokenization"):
        write_atomic(out / WORK / PLAN, json.dumps(plan).encode())
        tokenizer.save(out / TOKENIZER)
        for left in out.glob(".*.part"):  # of a process that was killed
            left.unlink()
        results = _run(tasks, tokenizer, processes or max(1, cores // THREADS))
        shards = [Shard(**shard) for result in results for shard in result["shards"]]
        empty = sum(result["empty"] for result in results)
        weights = {source["name"]: source["weight"] for source in report["sources"] if source["weight"]}
        write_index(out, tokenizer, shards, plan=plan, empty=empty, weights=weights)
        shutil.rmtree(out / WORK)
    folder = TokenFolder(out)
    return Tokenized(folder.documents, folder.tokens, empty)


def _is_finished(out: Path, plan: dict[str, Any]) -> bool:
    """Whether ``out`` is complete. UserError unless it is new, empty or of the same plan."""
    try:
        names = {path.name for path in out.iterdir()} if out.exists() else set()
    except OSError as error:
        raise UserError(f"can't use the folder {out}: {error.strerror}") from None
    finished = INDEX in names
    if not finished and not (out / WORK / PLAN).exists():
        if names <= {WORK, LOCK}:  # new, or left by a process that was killed at once
            return False
        raise UserError(f"{out} is not empty: choose another folder with --out")
    before = read_json(out / INDEX, INDEX_LIMIT).get("plan") if finished else read_json(out / WORK / PLAN, INDEX_LIMIT)
    if before != plan:
        other = [name for name in plan if not isinstance(before, dict) or before.get(name) != plan[name]]
        raise UserError(
            f"{out} was made with another {' and another '.join(other)}: choose another folder with --out, or remove it"
        )
    return finished


def _tasks(corpus: Path, shards: Sequence[dict[str, Any]], out: Path, shard_tokens: int) -> list[_Task]:
    most = min(TASK_LIMIT, sum(shard["characters"] for shard in shards) // TASKS)
    tasks: list[_Task] = []
    inputs: list[dict[str, Any]] = []
    for shard in shards:
        inputs.append(shard)
        if sum(shard["characters"] for shard in inputs) >= most or shard is shards[-1]:
            tasks.append(_Task(len(tasks), corpus, tuple(inputs), out, shard_tokens))
            inputs = []
    return tasks


def _run(tasks: Sequence[_Task], tokenizer: Tokenizer, processes: int) -> list[dict[str, Any]]:
    """The record of each task; those that are not done are done."""
    results = {task.number: result for task in tasks if (result := _result(task))}
    left = [task for task in tasks if task.number not in results]
    size = sum(shard["characters"] for task in left for shard in task.inputs)
    if results:
        console.say("continuing", f"{len(results):,} of {len(tasks):,} parts are done")
    failed: list[UserError] = []
    with progress("tokenize", size) as bar:
        processes = min(processes, len(left), size // ALONE)
        if processes > 1:
            failed = _in_processes(left, tokenizer, processes, bar.advance)
        else:
            for task in left:
                try:
                    _encode(task, tokenizer, bar.advance)
                except UserError as error:
                    failed.append(error)
    if failed:
        more = f" (and {len(failed) - 1} more errors)" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{more}; the rest is encoded, and a rerun continues")
    return [result for task in tasks if (result := _result(task))]


def _result(task: _Task) -> dict[str, Any] | None:
    """The record of a task that is done, whose files are there."""
    if not task.record.exists():
        return None
    result = read_json(task.record, INDEX_LIMIT)
    paths = [
        task.out / f"{shard['name']}.{suffix}" for shard in result["shards"] for suffix in ("tokens", "documents.npy")
    ]
    return result if all(path.exists() for path in paths) else None


def _encode(task: _Task, tokenizer: Tokenizer, advance: Callable[[int], None]) -> None:
    """Do a task: encode the documents of its shards, and write its record."""
    waiting: deque[tuple[str, int, int]] = deque()  # source, key and characters of documents that are being encoded
    shards: list[Shard] = []
    empty = 0

    def texts() -> Iterator[str]:
        nonlocal empty
        for shard in task.inputs:
            path = task.corpus / shard["name"]
            for number, line in enumerate(read_shard(task.corpus, shard), start=1):
                try:
                    text, source, group = _fields(line)
                    key = document_key(text, group)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number:,}, is no document: {one_line(error)}") from None
                if not text:
                    empty += 1
                    continue
                waiting.append((source, key, len(text)))
                yield text

    writer: ShardWriter | None = None
    length = 0
    try:
        for ids, last in tokenizer.encode_pieces(texts()):
            if writer is None:
                suffix = f"-{len(shards)}" if shards else ""
                writer = ShardWriter(task.out, f"{task.number:05d}{suffix}", tokenizer)
            writer.append(ids)
            length += ids.size
            if not last:
                continue
            source, key, size = waiting.popleft()
            if length:
                writer.end_document(source, key)
            else:  # a normalizer may leave nothing of a text
                empty += 1
            length = 0
            advance(size)
            if writer.tokens >= task.shard_tokens or writer.full:
                shards.append(writer.close())
                writer = None
        if writer is not None and writer.documents:
            shards.append(writer.close())
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    result = {"shards": [asdict(shard) for shard in shards], "empty": empty}
    write_atomic(task.record, json.dumps(result).encode())


def _fields(line: bytes) -> tuple[str, str, str | None]:
    """Text, source and group of the document in a line; ValueError where it has no such ones."""
    document = json.loads(line)
    if not isinstance(document, dict):
        raise ValueError(f"it is {shown(document)}")
    text, source, group = document.get("text"), document.get("source"), document.get("group")
    if not isinstance(text, str) or not isinstance(source, str) or not (group is None or isinstance(group, str)):
        names = {"text": text, "source": source, "group": group or ""}
        name = next(name for name, value in names.items() if not isinstance(value, str))
        raise ValueError(f"its {name} is {shown(names[name])}")
    return text, source, group


# ---- processes ----

_tokenizer: Tokenizer
_done: Any  # characters that all processes have encoded


def _in_processes(
    tasks: Sequence[_Task], tokenizer: Tokenizer, processes: int, advance: Callable[[int], None]
) -> list[UserError]:
    """Do the tasks in worker processes; the errors of those that failed."""
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    arguments = (tasks[0].out / TOKENIZER, tokenizer.eos_ids, done, threads)
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=arguments)
    shown, failed = 0, []
    try:
        with starting():
            left: set[Future[None]] = {pool.submit(_encode_here, task) for task in tasks}
        while left:
            ended, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            advance(done.value - shown)
            shown = done.value
            for future in ended:
                try:
                    future.result()
                except UserError as error:
                    failed.append(error)
                except BrokenProcessPool:
                    raise UserError(
                        "a process that encodes was killed, perhaps for lack of memory; a rerun continues, "
                        "and --processes sets how many there are"
                    ) from None
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return sorted(failed, key=str)


def _begin(path: Path, eos_ids: tuple[int, ...], done: Any, threads: int) -> None:
    """In a worker process."""
    global _tokenizer, _done
    end_with_parent()
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    _tokenizer, _done = Tokenizer.load(path, eos_ids), done


def _encode_here(task: _Task) -> None:
    def advance(characters: int) -> None:
        with _done.get_lock():
            _done.value += characters

    _encode(task, _tokenizer, advance)
