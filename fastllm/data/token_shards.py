"""A folder of tokens: what :mod:`fastllm.data.tokenize` writes and a model is trained on.

    index.json             the version, the dtype, the end-of-text token, the sources, the shards with their sizes and
                           SHA-256, and a checksum of itself
    tokenizer.json         the tokenizer that made the tokens
    00000.tokens           token ids, little-endian uint16 where they fit, else uint32: documents one after the other,
                           each with one end-of-text token behind it
    00000.documents.npy    one record of DOCUMENT for each document of the shard

A document's key tells it from others wherever it is found again. Its high 32 bits are a hash of the file or record that
the document was cut from, its low 32 bits a hash of the document's own text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from ..files import atomic, atomic_folder, to_disk, write_atomic
from ..input_files import Keys, open_regular, read_json
from .tokenizer import Tokenizer

INDEX, TOKENIZER = "index.json", "tokenizer.json"
VERSION = 1
INDEX_LIMIT = 2**28  # bytes: a million shards
# source: a number of the shard's own list. length: tokens, the end-of-text token included.
DOCUMENT = np.dtype([("key", "<u8"), ("length", "<u4"), ("source", "<u4")])
SHARD_TOKENS = 2**27  # a shard ends with the document that reaches this
SHARD_DOCUMENTS = 2**20  # or this: their records are held in memory until then
OPEN_SHARDS = 256  # at a time; each takes a file descriptor
CHUNK = 2**22  # bytes that are read and checked at a time


@dataclass(frozen=True)
class Shard:
    """What the index has of a shard."""

    name: str
    tokens: int
    documents: int
    sources: list[str]  # by the number in its documents' records
    tokens_sha256: str
    documents_sha256: str


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds the ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def document_key(text: str, group: str | None = None) -> int:
    """The key of a document; ``group``: a hash of the file or record that it was cut from, by default its own text.

    Raises UnicodeEncodeError, a ValueError, for a text with a lone surrogate.
    """
    own = hashlib.blake2b(digest_size=8)
    for start in range(0, len(text), CHUNK):
        own.update(text[start : start + CHUNK].encode())
    whole = hashlib.blake2b(group.encode(), digest_size=4).digest() if group else own.digest()[:4]
    return int.from_bytes(whole + own.digest()[4:], "big")


class TokenFolder:
    """Tokens in shards, as one row, and the documents that it is made of.

    Opening it checks the index and the sizes of all files; :meth:`verify` reads everything.

    Attributes:
        path: the folder.
        dtype: of the tokens.
        vocab_size, eos_id, fingerprint: of the tokenizer.
        checksum: the index's own, hexadecimal: it stands for the whole content.
        sources: names, by the numbers in :attr:`source`.
        weights: of the sources in a mixture, by their names, where the recipe of the corpus gives them.
        shards: in their order.
        tokens, documents: how many there are.

    Raises:
        UserError: a file is missing, damaged or does not belong to the others.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path / INDEX)
        keys = Keys(self.path / INDEX, index)
        self.vocab_size = keys.integer("vocab_size", most=2**32)
        self.eos_id = keys.integer("eos_id", least=0, most=self.vocab_size - 1)
        self.fingerprint = keys.string("fingerprint")
        self.checksum = keys.string("checksum")
        self.dtype = np.dtype(keys.string("dtype"))
        if self.dtype != dtype_of(self.vocab_size):
            raise UserError(f"{keys.path}: {self.dtype} is not the dtype of {self.vocab_size} tokens")
        try:
            self.shards = [Shard(**shard) for shard in index["shards"]]
        except (KeyError, TypeError):
            raise keys.wrong("shards", "a list of shards") from None
        for shard in self.shards:
            if not re.fullmatch(r"[\w-]+", shard.name):
                raise UserError(f"{keys.path}: {shard.name!r} is no name of a shard")
            self._check_sizes(shard)
        self.sources = list(dict.fromkeys(name for shard in self.shards for name in shard.sources))
        weights = index.get("weights", {})
        if not isinstance(weights, dict) or not all(isinstance(value, float | int) for value in weights.values()):
            raise keys.wrong("weights", "numbers by the names of sources")
        self.weights: dict[str, float] = weights
        self.tokens = sum(shard.tokens for shard in self.shards)
        self.documents = sum(shard.documents for shard in self.shards)
        if not self.tokens:
            raise UserError(f"{self.path} holds no tokens")
        self._ends = np.cumsum([shard.tokens for shard in self.shards])
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        tokenizer = Tokenizer.load(self.path / TOKENIZER, eos_ids=(self.eos_id,))
        if tokenizer.fingerprint != self.fingerprint or tokenizer.vocab_size != self.vocab_size:
            raise UserError(f"{self.path / TOKENIZER} is not the tokenizer that the shards beside it were made with")
        return tokenizer

    # By document. Of several shards each array is made when it is first asked for, and held: of 100 million documents
    # 0.4 GB of lengths, 0.4 GB of source, 0.8 GB of keys and 0.8 GB of starts.

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document with its end-of-text token, uint32; memory-mapped where there is one shard."""
        return self._column("length")

    @cached_property
    def keys(self) -> np.ndarray:
        """The key of each document, uint64; memory-mapped where there is one shard."""
        return self._column("key")

    @cached_property
    def source(self) -> np.ndarray:
        """The number of each document's source, uint32; memory-mapped where there is one shard."""
        return self._column("source")

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins in the row of all tokens, int64."""
        starts = np.zeros(self.documents, np.int64)
        np.cumsum(self.lengths[:-1], out=starts[1:])
        return starts

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the row of all tokens, read from the files.

        They are not mapped: pages once touched would count as the process's memory, which then grows with the data.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        number = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            end = int(self._ends[number])
            first = end - self.shards[number].tokens
            parts.append(self._pread(number, start - first, min(stop, end) - start))
            start, number = end, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def gather(self, starts: Iterable[int], lengths: Iterable[int]) -> np.ndarray:
        """The tokens of each span, ``lengths`` from ``starts`` on, one span after the other."""
        spans = [self.read(int(start), int(start) + int(n)) for start, n in zip(starts, lengths, strict=True)]
        return np.concatenate([np.empty(0, self.dtype), *spans])

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every ``parts``-th shard from ``part`` on, and check it against the index.

        Raises:
            UserError: a shard is damaged, or the tokenizer is another one.
        """
        assert self.tokenizer is not None  # checked as it is read
        for number in range(part, len(self.shards), parts):
            shard, table = self.shards[number], self._table(number)
            path = self._documents_file(shard)
            if _sha256(path) != shard.documents_sha256:
                raise UserError(f"{path} is damaged: its SHA-256 is not that in {INDEX}")
            self._check_tokens(shard, np.cumsum(table["length"], dtype=np.int64) - 1)

    def _check_tokens(self, shard: Shard, eos_places: np.ndarray) -> None:
        path, digest, done = self._tokens_file(shard), hashlib.sha256(), 0
        for chunk in _chunks(path):
            digest.update(chunk)
            ids = np.frombuffer(chunk, self.dtype, len(chunk) // self.dtype.itemsize)
            if ids.size and (largest := int(ids.max())) >= self.vocab_size:
                place = done + int(ids.argmax())
                raise UserError(
                    f"{path}: token {place:,} is {largest}, out of range: the tokenizer has {self.vocab_size} tokens"
                )
            here = eos_places[slice(*np.searchsorted(eos_places, (done, done + ids.size)))]
            if (ids[here - done] != self.eos_id).any():
                raise UserError(f"{path} is damaged: a document does not end with the token {self.eos_id}")
            done += ids.size
        if digest.hexdigest() != shard.tokens_sha256:
            raise UserError(f"{path} is damaged: its SHA-256 is not that in {INDEX}")

    def _check_sizes(self, shard: Shard) -> None:
        for path, size in (
            (self._tokens_file(shard), shard.tokens * self.dtype.itemsize),
            (self._documents_file(shard), len(_header(shard.documents)) + shard.documents * DOCUMENT.itemsize),
        ):
            with open_regular(path, "the shard ") as file:
                found = os.fstat(file.fileno()).st_size
            if found != size:
                raise UserError(f"{path} is damaged: it has {found:,} bytes, and {size:,} by {INDEX}")

    def _tokens_file(self, shard: Shard) -> Path:
        return self.path / f"{shard.name}.tokens"

    def _documents_file(self, shard: Shard) -> Path:
        return self.path / f"{shard.name}.documents.npy"

    def _open_shard(self, number: int) -> BinaryIO:
        return open_regular(self._tokens_file(self.shards[number]), "the shard ")

    def _pread(self, number: int, first: int, n: int) -> np.ndarray:
        content = np.empty(n, self.dtype)
        left, place = content.view(np.uint8).data, first * self.dtype.itemsize
        file = self._open(number)
        while left:
            try:
                done = os.preadv(file.fileno(), [left], place)
            except OSError as error:
                raise UserError(f"can't read {file.name}: {error.strerror}") from None
            if not done:
                raise UserError(f"{file.name} is damaged: it ends before token {first + n:,}")
            left, place = left[done:], place + done
        return content

    def _table(self, number: int) -> np.ndarray:
        """The records of a shard's documents; UserError where they can't be those of its tokens."""
        shard = self.shards[number]
        path, header = self._documents_file(shard), _header(shard.documents)
        with open_regular(path) as file:
            if file.read(len(header)) != header:
                raise UserError(f"{path} is damaged: its header is not that of {shard.documents:,} documents")
        table = _map(path, DOCUMENT, len(header), shard.documents)
        if table["length"].min() < 1 or table["length"].sum(dtype=np.uint64) != shard.tokens:
            raise UserError(f"{path} is damaged: its documents have not the {shard.tokens:,} tokens of the shard")
        if table["source"].max() >= len(shard.sources):
            raise UserError(f"{path} is damaged: a document is of source {table['source'].max()}, which is not there")
        return table

    def _column(self, name: str) -> np.ndarray:
        if len(self.shards) == 1:  # whose sources are those of the folder
            return self._table(0)[name]
        column, done = np.empty(self.documents, DOCUMENT[name].newbyteorder("=")), 0
        numbers = {source: number for number, source in enumerate(self.sources)}
        for number, shard in enumerate(self.shards):
            values = self._table(number)[name]
            if name == "source":
                values = np.array([numbers[source] for source in shard.sources])[values]
            column[done : done + shard.documents] = values
            done += shard.documents
        return column


class ShardWriter:
    """Writes one shard, document by document. The files have their names only once they are complete."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.folder, self.name = folder, name
        self.tokens = 0
        self._dtype, self._vocab_size, self._eos_id = (
            dtype_of(tokenizer.vocab_size),
            tokenizer.vocab_size,
            tokenizer.eos_id,
        )
        self._part = folder / f".{name}.tokens.{os.getpid()}.part"
        self._length, self._sha256 = 0, hashlib.sha256()
        self._keys, self._lengths, self._numbers = array("Q"), array("I"), array("I")
        self._sources: dict[str, int] = {}
        with self._errors():
            self._file = open(self._part, "wb", buffering=CHUNK)  # noqa: SIM115, closed by close or discard

    @property
    def documents(self) -> int:
        return len(self._keys)

    @property
    def full(self) -> bool:
        """Whether as many documents as a shard should hold are in it."""
        return self.documents >= SHARD_DOCUMENTS

    def append(self, ids: np.ndarray) -> None:
        """Write the next tokens of a document."""
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise ValueError(f"token {ids.max()} of a vocabulary of {self._vocab_size}")
        self._write(ids)

    def end_document(self, source: str, key: int) -> None:
        """End the document with the end-of-text token."""
        self._write(np.array([self._eos_id]))
        if self._length >= 2**32:
            raise UserError(f"a document of {source} has {self._length:,} tokens; at most {2**32 - 1:,} are possible")
        self._keys.append(key)
        self._lengths.append(self._length)
        self._numbers.append(self._sources.setdefault(source, len(self._sources)))
        self._length = 0

    def close(self) -> Shard:
        """Flush both files to disk and give them their names."""
        assert not self._length, "the last document has no end"
        with self._errors():
            self._file.close()
            to_disk(self._part)
        records = np.empty(self.documents, DOCUMENT)
        records["key"], records["length"], records["source"] = self._keys, self._lengths, self._numbers
        content = _header(self.documents) + records.tobytes()
        with atomic(self.folder / f"{self.name}.documents.npy") as part, open(part, "wb") as file:
            file.write(content)
        with self._errors():
            os.replace(self._part, self.folder / f"{self.name}.tokens")
        sha256 = self._sha256.hexdigest()
        return Shard(
            self.name, self.tokens, self.documents, list(self._sources), sha256, hashlib.sha256(content).hexdigest()
        )

    def discard(self) -> None:
        """Remove what is not complete."""
        with suppress(OSError):  # a full disk
            self._file.close()
        self._part.unlink(missing_ok=True)

    def _write(self, ids: np.ndarray) -> None:
        content = ids.astype(self._dtype).tobytes()
        self._sha256.update(content)
        with self._errors():
            self._file.write(content)
        self.tokens += ids.size
        self._length += ids.size

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"can't write {self.folder / self.name}.tokens: {error.strerror or error}") from error


class TokenWriter:
    """Adds documents to a folder of tokens, shard by shard. Use :func:`write_tokens`, which writes the index too."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.empty = 0  # documents without a token, which are left out
        self._folder, self._tokenizer, self._shard_tokens = folder, tokenizer, shard_tokens
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None

    def add(self, ids: np.ndarray, source: str, key: int) -> None:
        """Add a document: the ids of its text, without an end-of-text token, its source and :func:`document_key`."""
        if not ids.size:
            self.empty += 1
            return
        if self._writer is None:
            self._writer = ShardWriter(self._folder, f"{len(self._shards):05d}", self._tokenizer)
        self._writer.append(ids)
        self._writer.end_document(source, key)
        if self._writer.tokens >= self._shard_tokens or self._writer.full:
            self._end_shard()

    def finish(self) -> None:
        """Complete the last shard and write the index."""
        if self._writer is not None:
            self._end_shard()
        write_index(self._folder, self._tokenizer, self._shards)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()

    def _end_shard(self) -> None:
        assert self._writer is not None
        self._shards.append(self._writer.close())
        self._writer = None


@contextmanager
def write_tokens(folder: str | Path, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS) -> Iterator[TokenWriter]:
    """A writer of a folder of tokens. The folder, new or empty before, appears complete at the end of the block.

    Raises:
        UserError: no document with a token was added, or the folder can't be written.
    """
    with atomic_folder(folder) as part:
        writer = TokenWriter(part, tokenizer, shard_tokens)
        try:
            yield writer
            writer.finish()
        finally:
            writer.discard()


def write_index(folder: Path, tokenizer: Tokenizer, shards: Sequence[Shard], **more: Any) -> None:
    """Write the index of complete shards and, before it, the tokenizer. ``more``: further values of the index."""
    if not shards:
        raise UserError(f"no tokens for {folder}: there is no document with text")
    tokenizer.save(folder / TOKENIZER)
    index: dict[str, Any] = {
        "version": VERSION,
        "dtype": dtype_of(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "fingerprint": tokenizer.fingerprint,
        "shards": [asdict(shard) for shard in shards],
        **more,
    }
    index["checksum"] = _checksum(index)
    write_atomic(folder / INDEX, json.dumps(index, indent=1).encode() + b"\n")
    to_disk(folder)


def _read_index(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise UserError(f"can't read the tokens {path.parent}: there is no such folder")
    if not path.is_file():
        raise UserError(f"{path.parent} is no folder of tokens: it has no {INDEX}")
    index = read_json(path, INDEX_LIMIT)
    if index.get("version") != VERSION:
        raise UserError(f"{path} is of version {index.get('version')!r}, and this fastllm reads version {VERSION}")
    if index.get("checksum") != _checksum(index):
        raise UserError(f"{path} is damaged: its checksum is wrong")
    return index


def _checksum(index: dict[str, Any]) -> str:
    values = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _header(documents: int) -> bytes:
    """The start of a .npy file (format 1.0) of so many DOCUMENT records, 128 bytes with every version of numpy."""
    text = f"{{'descr': {DOCUMENT.descr}, 'fortran_order': False, 'shape': ({documents},), }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"


def _map(path: Path, dtype: np.dtype, offset: int, n: int) -> np.ndarray:
    """A memory-mapped array of a file; UserError where it is shorter."""
    try:
        return np.memmap(path, dtype, "r", offset, n).view(np.ndarray)  # whose slices take less time
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from None


def _chunks(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while chunk := _read(file, path):
            yield chunk


def _read(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.read(CHUNK)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()
