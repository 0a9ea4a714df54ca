"""The words of a text and 64-bit hashes of its n-grams, for MinHash and decontamination.

What counts as a word follows FineWeb and datatrove: case doesn't count, and punctuation and symbols separate words as
white space does. In scripts without spaces between words, each Chinese or Japanese character is a word, and so is each
Thai, Lao, Burmese or Khmer letter with its vowel signs and tone marks, and each emoji. A hash depends on the text
alone, never on the machine, the process or Python's own hash().
"""

from __future__ import annotations

import unicodedata

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Units = NDArray[np.uint8] | NDArray[np.uint16]

BLOCK = 1 << 16  # units or words that are hashed at once: what numpy writes meanwhile stays in the cache


class Words:
    """A text cut into words.

    Attributes:
        units: the text in NFC, as ASCII or UTF-16 units.
        starts: the unit with which each word begins.
    """

    def __init__(self, text: str) -> None:
        if text.isascii():
            content = text.encode("ascii")
            self.units: Units = np.frombuffer(content, np.uint8)
            classes = np.frombuffer(content.translate(_CLASSES[:256].tobytes()), np.uint8)
        else:
            text = unicodedata.normalize("NFC", text)
            self.units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
            classes = _CLASSES.take(self.units)
        first = classes != _SEPARATOR
        if len(classes) and classes.max() > _LETTER:
            first[1:] = _FIRST.take(classes[1:] + 8 * classes[:-1])
        else:
            np.greater(classes[1:], classes[:-1], out=first[1:])
        self.starts = np.flatnonzero(first)

    def __len__(self) -> int:
        return len(self.starts)

    def hashes(self) -> Hashes:
        """A hash for each word, in order. Of a word longer than 65,536 units, these count."""
        if not len(self):
            return np.empty(0, np.uint64)
        if len(self.units) <= BLOCK:
            return mix(self._polynomials(0, len(self.units), self.starts))
        out = np.empty(len(self), np.uint64)
        ends = np.append(self.starts[1:], len(self.units))
        i = 0
        while i < len(out):
            start = int(self.starts[i])
            stop = max(i + 1, int(np.searchsorted(ends, start + BLOCK, "right")))
            end = min(int(ends[stop - 1]), start + BLOCK)
            out[i:stop] = self._polynomials(start, end, self.starts[i:stop] - start)
            i = stop
        return mix(out)

    def _polynomials(self, start: int, end: int, offsets: NDArray[np.intp]) -> Hashes:
        values = _VALUES.take(self.units[start:end])
        values *= _POWERS[: len(values)]
        return np.add.reduceat(values, offsets) * _INVERSES.take(offsets)

    def text(self, first: int, last: int) -> str:
        """The text from one word to another, that one included, on one line."""
        stop = self.starts[last + 1] if last + 1 < len(self) else len(self.units)
        units = self.units[self.starts[first] : stop].tobytes()
        encoding = "ascii" if self.units.dtype == np.uint8 else "utf-16-le"
        return " ".join(units.decode(encoding, "replace").split())


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """A hash for each run of ``n`` words; none where there are fewer words."""
    if len(words) < n:
        return np.empty(0, np.uint64)
    if len(words) <= BLOCK:
        return _windows(words, n)
    step = BLOCK - n + 1
    return np.concatenate([_windows(words[i : i + BLOCK], n) for i in range(0, len(words) - n + 1, step)])


def shingles(text: str, n: int) -> Hashes:
    """The n-grams of ``text``: the set whose Jaccard similarity counts. A text of fewer words is one n-gram."""
    words = Words(text).hashes()
    return ngram_hashes(words, max(1, min(n, len(words))))


def mix(values: Hashes) -> Hashes:
    """Change each value, in place, so that each of its bits depends on all (the finalizer of MurmurHash3)."""
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


# A run of values v[i:j] is hashed as the polynomial sum(v[k] * BASE ** (k - i)) modulo 2 ** 64, then mixed.
_BASE = 0x9E3779B97F4A7C15


def _power_table(base: int) -> Hashes:
    table = np.full(BLOCK + 1, base, np.uint64)
    table[0] = 1
    return np.multiply.accumulate(table)


_POWERS = _power_table(_BASE)
_INVERSES = _power_table(pow(_BASE, -1, 1 << 64))


def _windows(words: Hashes, n: int) -> Hashes:
    sums = np.empty(len(words) + 1, np.uint64)
    sums[0] = 0
    np.multiply(words, _POWERS[: len(words)], out=sums[1:])
    np.add.accumulate(sums, out=sums)
    return mix((sums[n:] - sums[:-n]) * _INVERSES[: len(words) - n + 1])


# Classes of UTF-16 units.
_SEPARATOR = 0
_LETTER = 1
_CHARACTER = 2  # a word of its own, with the marks that follow
_MARK = 3  # belongs to what is before it
_LEADING = 4  # a vowel that is written before its consonant

_CHARACTERS = (
    (0x3005, 0x3007), (0x3041, 0x3096), (0x309D, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F),  # Chinese and Japanese
    (0xD83C, 0xD83E), (0xD840, 0xD8BF),  # first halves of emoji and of rare Chinese characters
    (0x0E01, 0x0E2E), (0x0E30, 0x0E30), (0x0E32, 0x0E33), (0x0E45, 0x0E46),  # Thai
    (0x0E81, 0x0EB0), (0x0EB2, 0x0EB3), (0x0EC6, 0x0EC6), (0x0EDC, 0x0EDF),  # Lao
    (0x1000, 0x102A), (0x103F, 0x103F), (0x1780, 0x17B3),  # Burmese, Khmer
)  # fmt: skip
_MARKS = (
    (0xDC00, 0xDFFF), (0x3099, 0x309A), (0xFE00, 0xFE0F), (0x0E31, 0x0E31), (0x0E34, 0x0E3A), (0x0E47, 0x0E4E),
    (0x0EB1, 0x0EB1), (0x0EB4, 0x0EBC), (0x0EC8, 0x0ECE), (0x102B, 0x103E), (0x17B4, 0x17D3), (0x17DD, 0x17DD),
)  # fmt: skip
_LEADERS = ((0x0E40, 0x0E44), (0x0EC0, 0x0EC4))


def _unit_classes() -> NDArray[np.uint8]:
    separators = ("P", "S", "Z", "Cc", "Cf")
    categories = (unicodedata.category(chr(unit)) for unit in range(1 << 16))
    classes = np.fromiter(
        (_SEPARATOR if category.startswith(separators) else _LETTER for category in categories), np.uint8, 1 << 16
    )
    for ranges, kind in ((_CHARACTERS, _CHARACTER), (_MARKS, _MARK), (_LEADERS, _LEADING)):
        for first, last in ranges:
            classes[first : last + 1] = kind
    return classes


def _unit_values(classes: NDArray[np.uint8]) -> Hashes:
    """A random number for each unit, that of its lower case; 0 for separators: they add nothing to their word."""
    lower = np.arange(1 << 16, dtype=np.uint64)
    for unit in range(1 << 16):
        letter = chr(unit).lower()
        if len(letter) == 1:
            lower[unit] = ord(letter)
    values = mix((lower + np.uint64(1)) * np.uint64(0xD1342543DE82EF95))
    values[classes == _SEPARATOR] = 0
    return values


_CLASSES = _unit_classes()
_VALUES = _unit_values(_CLASSES)
# Whether a word begins between units of two classes, at 8 * the first's + the second's.
_FIRST = np.array(
    [
        (after == _LETTER and before != _LETTER)
        or (after == _CHARACTER and before != _LEADING)
        or after == _LEADING
        or (after == _MARK and before == _SEPARATOR)
        for before in range(8)
        for after in range(8)
    ]
)
