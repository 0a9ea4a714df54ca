"""The data path against its peers: WARC to documents, MinHash, tokenizing, the loader; and the memory that each takes.

    python -m benchmarks.data --pages FOLDER              HTML pages, of documentation packages for example
    python -m benchmarks.data --pages FOLDER --memory     also peak memory at 10 MB and 2 GB of input (an hour)

Implementations take turns in one run on one core each, where nothing else is said. Writes data.json and data.md into
benchmarks/results/<device>/. Peers: datatrove's WarcReader (warcio) with its Trafilatura extractor, rensa's RMinHash,
the tokenizers library itself
(pip install datatrove trafilatura lxml_html_clean warcio faust-cchardet python-magic).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastllm import config as configs
from fastllm.data.cleaning import FILTERS, settings
from fastllm.data.corpus.recipe import Recipe, SourceSpec
from fastllm.data.corpus.tally import Tally
from fastllm.data.corpus.worker import Batch, Worker
from fastllm.data.deduplication import MinHash, exact_key
from fastllm.data.document import Document
from fastllm.data.readers import ReaderOptions, Skipped, Source, open_source
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError
from fastllm.files import write_atomic
from fastllm.input_files import read_json
from fastllm.training.run_data import load_run_data, open_tokens

from .record import FOLDER
from .timing import device_name, stamp
from .turns import Row, in_turns, table

MB = 1e6
DUPLICATES = ("exact_duplicates", "near_duplicates")
SIZES = (10, 2000)  # MB of input whose peak memory is compared
SMALL = [
    "--model.dim",
    "32",
    "--model.layers",
    "1",
    "--model.heads",
    "1",
    "--model.ffn-dim",
    "64",
    "--train.steps",
    "20",
]


class _Quiet:
    """A reader's log that only counts."""

    def __init__(self) -> None:
        self.count = 0

    def skipped(self, reason: str, n: int = 1) -> None:
        self.count += n

    def problem(self, where: str, message: str) -> None:
        raise UserError(f"{where}: {message}")


# ---- inputs ----


def make_warc(pages: Path, path: Path, megabytes: float) -> int:
    """A gzipped WARC of the HTML files below ``pages``, over and over up to a size; returns the bytes of HTML."""
    files = sorted(file for file in pages.rglob("*.htm*") if file.is_file() and not file.is_symlink())
    if not files:
        raise UserError(f"there are no HTML files in {pages}")
    total = 0
    with open(path, "wb") as warc:
        for n, file in enumerate(itertools.cycle(files)):
            body = file.read_bytes()
            block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            head = (
                f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{uuid.UUID(int=n)}>\r\n"
                f"WARC-Target-URI: https://example.org/{n}/{file.name}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
                "WARC-Identified-Payload-Type: text/html\r\n"
                f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(block)}\r\n\r\n"
            )
            warc.write(gzip.compress(head.encode() + block + b"\r\n\r\n", 6))
            total += len(body)
            if total >= megabytes * MB:
                break
    return total


def documents_of(warc: Path) -> Iterator[Document]:
    (source,) = open_source(str(warc), ReaderOptions())
    for record in source.records(_Quiet()):
        try:
            yield source.extract(record)
        except Skipped:
            continue


# ---- measurements ----


def rate(work: float, call: Callable[[], Any]) -> float:
    """``work`` in a second of this process."""
    began = time.process_time()
    call()
    return work / (time.process_time() - began)


def warc_rows(warc: Path, size: int) -> list[Row]:
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.readers import WarcReader

    def ours() -> None:
        (source,) = open_source(str(warc), ReaderOptions())
        worker = Worker(Recipe((SourceSpec(str(warc)),)), [(0, source)])
        for n, record in enumerate(source.records(_Quiet())):
            worker.clean(Batch([(0, n, record)], Tally()))

    def extract_only() -> None:
        for _ in documents_of(warc):
            pass

    def theirs() -> None:
        # Without the process of its own in which each page is given a time limit: ours counts no processes either.
        extractor, characters = Trafilatura(), 0
        for document in WarcReader(str(warc.parent), glob_pattern=warc.name).run():
            characters += len(extractor.extract(document.text) or "")
        if not characters:
            raise UserError("datatrove gives no text of these pages")

    found = in_turns(
        {
            "ours": lambda: rate(size / MB, ours),
            "extract": lambda: rate(size / MB, extract_only),
            "theirs": lambda: rate(size / MB, theirs),
        }
    )
    peer = "datatrove: warcio + trafilatura, text alone"
    return [
        Row("WARC to text", "MB/s of HTML and core", found["extract"], peer, found["theirs"]),
        Row("WARC to clean documents, keys, signatures", "MB/s of HTML and core", found["ours"], peer, found["theirs"]),
    ]


def stage_rows(warc: Path, size: int) -> list[Row]:
    """Seconds of each stage for a GB of HTML on one core."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = call()
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - began
        return result

    (source,) = open_source(str(warc), ReaderOptions())
    records = timed("read and decompress", lambda: list(source.records(_Quiet())))
    documents = timed("HTML to text", lambda: list(_extracted(source, records)))
    for name, one in settings({}).items():
        judge = one.build()
        documents = timed(name, lambda judge=judge, documents=documents: [d for d in documents if not judge(d)])
    minhash = MinHash()
    timed("exact key", lambda: [exact_key(d.text) for d in documents])
    timed("MinHash signature", lambda: [minhash.signature(d.text) for d in documents])
    timed("JSON", lambda: [json.dumps(d.to_json(), ensure_ascii=False).encode() for d in documents])
    each = {name: value * 1000 * MB / size for name, value in seconds.items()}
    return [Row(name, "s for 1 GB of HTML", (value,) * 3) for name, value in each.items()]


def _extracted(source: Source, records: Iterable[Any]) -> Iterator[Document]:
    for record in records:
        try:
            yield source.extract(record)
        except Skipped:
            continue


def minhash_rows(texts: list[str]) -> list[Row]:
    import rensa

    size = sum(map(len, texts)) / MB
    minhash = MinHash()
    permutations = minhash.settings.permutations

    def theirs() -> None:
        for text in texts:
            words = re.findall(r"\w+", text.lower())
            grams = [" ".join(words[i : i + 5]) for i in range(len(words) - 4)]
            one = rensa.RMinHash(num_perm=permutations, seed=1)
            one.update(grams)
            one.digest()

    calls = {
        "ours": lambda: rate(size, lambda: [minhash.signature(text) for text in texts]),
        "theirs": lambda: rate(size, theirs),
    }
    found = in_turns(calls)
    peer = "rensa's RMinHash of 5-grams made in Python"
    return [Row("MinHash signature", "M characters/s and core", found["ours"], peer, found["theirs"])]


def loader_rows(scratch: Path) -> list[Row]:
    """The batches of the default run, made by one thread, against what its steps consume."""
    run = scratch / "default"
    words = ["train", "--out", str(run), "--train.steps", "150"]
    subprocess.run([sys.executable, "-m", "fastllm", *words], check=True, stdout=subprocess.DEVNULL)
    consumed = read_json(run / "run.json")["tokens_per_second"] / MB
    config = configs.load(run / "config.toml")
    data = load_run_data(config, open_tokens(config, run)).train
    tokens, steps = config.train.global_batch_tokens, 500
    position = itertools.count()

    def batches() -> None:
        for _ in range(steps):
            data.batch(next(position) * config.sequences, config.sequences)

    found = in_turns({"ours": lambda: rate(steps * tokens / MB, batches)})
    return [Row("loader", "M tokens/s and core", found["ours"], "the default training step", (consumed,) * 3)]


def tokenize_rows(corpus: Path, tokenizer: Path, scratch: Path) -> list[Row]:
    from fastllm.data import read_corpus
    from fastllm.data.tokenize import tokenize

    texts = [document["text"] for document in read_corpus(corpus)]
    size = sum(map(len, texts)) / MB
    number = iter(range(1000))

    def ours() -> float:
        began = time.monotonic()
        tokenize(corpus, tokenizer, scratch / f"tokens-{next(number)}")
        return size / (time.monotonic() - began)

    def theirs() -> float:
        backend = Tokenizer.load(tokenizer).backend  # without the words that it has met in the turn before
        began = time.monotonic()
        for first in range(0, len(texts), 256):
            backend.encode_batch_fast(texts[first : first + 256])
        return size / (time.monotonic() - began)

    found = in_turns({"ours": ours, "theirs": theirs})
    peer = "tokenizers.encode_batch_fast, nothing read or written"
    return [Row("tokenize a corpus, written", "M characters/s, all cores", found["ours"], peer, found["theirs"])]


# ---- memory ----


def peak_memory(command: list[str]) -> float:
    """MB of the largest process of a command."""
    code = (
        "import resource, subprocess, sys; "
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    status, kilobytes = map(int, result.stdout.split()[-2:])
    if status:
        raise UserError(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")
    return kilobytes / 1000


def memory_rows(pages: Path, scratch: Path) -> list[Row]:
    peaks: dict[str, list[float]] = {}
    fastllm = [sys.executable, "-m", "fastllm"]
    for megabytes in SIZES:
        folder = scratch / f"{megabytes}"
        folder.mkdir()
        make_warc(pages, folder / "pages.warc.gz", megabytes)
        without = ["--without", *DUPLICATES]  # the pages repeat
        corpus, tokens, tokenizer = (str(folder / name) for name in ("corpus", "tokens", "tokenizer.json"))
        source = str(folder / "pages.warc.gz")
        commands = {
            "data prepare, duplicates dropped": ["data", "prepare", source, "--out", f"{corpus}-unique"],
            "data prepare": ["data", "prepare", source, "--out", corpus, *without],
            "tokenizer train": ["tokenizer", "train", corpus, "--out", tokenizer, "--vocab-size", "8192"],
            "data tokenize": ["data", "tokenize", corpus, "--tokenizer", tokenizer, "--out", tokens],
            "train": ["train", "--data", tokens, "--out", str(folder / "run"), *SMALL],
        }
        for name, words in commands.items():
            peaks.setdefault(name, []).append(peak_memory([*fastllm, *words]))
    small, large = SIZES
    return [
        Row(
            f"{name}: peak memory at {large:,} MB",
            "MB",
            (b,) * 3,
            f"itself at {small} MB",
            (a,) * 3,
            f"{b - a:+.0f} MB",
        )
        for name, (a, b) in peaks.items()
    ]


# ---- the report ----


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pages", type=Path, required=True, help="a folder with HTML pages")
    parser.add_argument("--megabytes", type=float, default=100, help="of HTML in the WARC")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--out", type=Path, default=FOLDER / device_name(), help="the folder of the results")
    chosen = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        warc = scratch / "pages.warc.gz"
        size = make_warc(chosen.pages, warc, chosen.megabytes)
        few = scratch / "few" / "pages.warc.gz"  # of the slowest implementation
        few.parent.mkdir()
        rows = warc_rows(few, make_warc(chosen.pages, few, min(10.0, chosen.megabytes)))
        texts = [document.text for _, document in zip(range(2000), documents_of(warc), strict=False)]
        rows += minhash_rows(texts)
        corpus, tokenizer = scratch / "corpus", scratch / "tokenizer.json"
        for words in (
            ["data", "prepare", str(warc), "--out", str(corpus), "--without", *FILTERS, *DUPLICATES],
            ["tokenizer", "train", str(corpus), "--out", str(tokenizer), "--vocab-size", "32768"],
        ):
            subprocess.run([sys.executable, "-m", "fastllm", *words], check=True, stdout=subprocess.DEVNULL)
        rows += tokenize_rows(corpus, tokenizer, scratch)
        rows += loader_rows(scratch)
        stages = stage_rows(warc, size)
        memory = memory_rows(chosen.pages, scratch) if chosen.memory else []
    text = [f"# The data path on {device_name()}", "", table(rows), "", "## Time of each stage", "", table(stages)]
    if memory:
        text += ["", "## Peak memory of the largest process", "", table(memory)]
    print("\n".join(text))
    chosen.out.mkdir(parents=True, exist_ok=True)
    values = {**stamp(), "rows": [asdict(row) for row in (*rows, *stages, *memory)]}
    write_atomic(chosen.out / "data.json", json.dumps(values, indent=1).encode())
    write_atomic(chosen.out / "data.md", ("\n".join(text) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
