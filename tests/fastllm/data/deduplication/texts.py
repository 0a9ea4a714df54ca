"""Real texts, edited: pieces of Python's standard library, and copies of them with words changed."""

from __future__ import annotations

import random
import string
import sysconfig
from pathlib import Path

SEPARATORS = str.maketrans(dict.fromkeys(string.punctuation + string.whitespace + "\x1c\x1d\x1e\x1f\x00\x7f", " "))


def words_of(text: str) -> list[str]:
    """The words of an ASCII text, by other means than the package's."""
    return text.lower().translate(SEPARATORS).split()


def ngrams_of(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} or ({tuple(words)} if words else set())


def overlap(first: set, second: set) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def jaccard(a: str, b: str, n: int = 5) -> float:
    return overlap(ngrams_of(a, n), ngrams_of(b, n))


def pieces(count: int, words: int = 150) -> list[str]:
    """Distinct texts of some ``words`` words from the standard library's sources, comments and docstrings included."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").encode("ascii", "ignore").decode()
        tokens = text.split(" ")
        step = words * 2
        found += [" ".join(tokens[i : i + step]) for i in range(0, len(tokens) - step, step)]
        if len(found) >= 8 * count:
            break
    random.Random(0).shuffle(found)
    return [text for text in dict.fromkeys(found) if len(words_of(text)) >= words // 2][:count]


def edited(text: str, rate: float, draw: random.Random) -> str:
    """A copy in which that share of the words is replaced, removed or doubled, or its end is cut off."""
    if draw.random() < 0.2:
        return text[: int(len(text) * (1 - 3 * rate))]
    words = text.split(" ")
    out = []
    for word in words:
        if draw.random() < rate:
            out += draw.choice([[], [word, word], [f"word{draw.randrange(10**6)}"]])
        else:
            out.append(word)
    return " ".join(out)
