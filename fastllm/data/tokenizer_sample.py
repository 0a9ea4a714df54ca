"""The text that a tokenizer is trained on: all of a small corpus, evenly spaced parts of a large one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator

import zstandard

from ..errors import UserError
from .pieces import PIECE, Cutter

# Characters of different words: the trainer takes some 120 bytes for each. Python's standard library has 2.6 million.
TRAINING_WORDS = 4_000_000
TRAINING_CHARACTERS = 2**28  # of a text that repeats a few words
BLOCK = PIECE  # characters that are kept or dropped together
KEEP = 0.75  # of the blocks, each time when they have become too many
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio


class Sample:
    """Takes in texts one at a time, and holds a sample of bounded size, compressed, in a temporary file.

    The blocks of the sample are evenly spaced over all texts: the multiples of the golden ratio modulo 1 lie evenly, so
    do those below any limit, and block ``n`` is kept while its multiple is below a limit that shrinks. The sample
    depends on the texts alone.
    """

    def __init__(self, cutter: Cutter) -> None:
        self.blocks: dict[int, tuple[int, int]] = {}  # by number: where it is in the file, and its bytes
        self.characters = 0  # of the blocks
        self._cutter = cutter
        self._pieces: list[str] = []  # of the block that is being filled
        self._size = self._number = 0
        self._limit = 2**64
        self._sizes: dict[int, int] = {}
        self._words: set[str] = set()
        self._word_characters = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it ends with this object
        self._end = 0
        self._compressor, self._decompressor = zstandard.ZstdCompressor(1), zstandard.ZstdDecompressor()

    def add(self, texts: Iterable[str]) -> Iterator[int]:
        """Take in texts; gives the characters of each when it is done.

        Raises:
            UserError: a text has a lone surrogate.
        """
        for text in texts:
            for start, stop in self._cutter.spans(text, PIECE // 2):
                self._pieces.append(text[start:stop])
                self._size += stop - start
                if self._size >= BLOCK:
                    self._end_block()
            yield len(text)
        self._end_block()
        self._words.clear()

    def pieces(self) -> Iterator[str]:
        for number in self.blocks:
            yield from self._read(number)

    def _end_block(self) -> None:
        if self._priority(self._number) < self._limit:
            content = json.dumps(self._pieces, ensure_ascii=False)
            try:
                block = self._compressor.compress(content.encode())
            except UnicodeEncodeError as error:
                raise UserError(f"a text has a lone surrogate, {error.object[error.start]!r}") from None
            self._write(block)
            self._sizes[self._number] = self._size
            self.characters += self._size
            self._count(self._pieces)
            while self._is_too_large() and len(self.blocks) > 1:
                self._shrink()
        self._pieces, self._size = [], 0
        self._number += 1

    def _priority(self, number: int) -> int:
        return number * GOLDEN % 2**64

    def _is_too_large(self) -> bool:
        return self._word_characters > TRAINING_WORDS or self.characters > TRAINING_CHARACTERS

    def _shrink(self) -> None:
        self._limit = int(self._limit * KEEP)
        for number in [n for n in self.blocks if self._priority(n) >= self._limit]:
            del self.blocks[number]
            self.characters -= self._sizes.pop(number)
        self._words.clear()
        self._word_characters = 0
        for number in self.blocks:
            self._count(self._read(number))

    def _count(self, pieces: list[str]) -> None:
        new = {word for piece in pieces for word in piece.split()} - self._words
        self._words |= new
        self._word_characters += sum(map(len, new))

    def _write(self, block: bytes) -> None:
        try:
            self._file.seek(self._end)
            self._file.write(block)
            self._file.flush()
        except OSError as error:
            raise UserError(f"can't write a temporary file in {tempfile.gettempdir()}: {error.strerror}") from None
        self.blocks[self._number] = self._end, len(block)
        self._end += len(block)

    def _read(self, number: int) -> list[str]:
        place, size = self.blocks[number]
        self._file.seek(place)
        return json.loads(self._decompressor.decompress(self._file.read(size)))
