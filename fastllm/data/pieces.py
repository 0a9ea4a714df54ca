"""How text is split into words, and where a long text can be cut without a change of its tokens.

The tokens of a word depend on that word alone. So a text can be cut wherever a word certainly ends: the split pattern
looks at nothing before a word, and behind it only for whether white space follows white space.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import Regex, pre_tokenizers

PIECE = 2**14  # characters; the library takes some 100 bytes for each character of a text that it works on

# How GPT-4's tokenizer splits text: words with the space before them, up to three digits, punctuation, line ends.
# A run of 128 characters ends a word, because merging tokens in a word of n characters takes n² steps. Prose and code
# have no longer ones: the longest in Python's standard library is of 95.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}{1,128}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,128}[\r\n]{0,128}"
    r"|\s{0,128}[\r\n]{1,128}|\s{1,128}(?!\S)|\s{1,128}"
)

DIGITS = (1, 2, 3)  # how many a word may have at most


def split_pattern(digits: int) -> str:
    """SPLIT with words of at most so many digits."""
    return SPLIT.replace(r"\p{N}{1,3}", rf"\p{{N}}{{1,{digits}}}")


# The same without bounds: Llama 3's, and ours until now. And Qwen's, with single digits.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# GPT-2's, and GPT-4o's, in which marks and the ends of contractions belong to a word.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM's too, with single digits that go before: white space before one is a word of its own.
SMOLLM_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Where a word ends in all of these patterns but GPT-4o's, whatever stands around: white space other than line ends
# only begins a word, letters and digits are followed by their own kind.
SPACE = r"\S(?=[ \t])"
WORD_END = rf"\p{{L}}(?=\P{{L}})|\p{{N}}(?=\P{{N}})|{SPACE}"

LOOK = 512  # characters before the end of a piece, among which a place to cut is looked for first
TRIES = 8  # ends of words that are tried as places to cut, for text without any certain one
MARGIN = 1024  # more characters than SPLIT looks at from the start of a word: two runs and a few


class Cutter:
    """Cuts texts into pieces whose token ids, one after the other, are those of the whole text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._pre_tokenizer = backend.pre_tokenizer
        ends, self._may_resync = _word_ends(backend)
        self._ends = pre_tokenizers.Split(Regex(ends), "merged_with_previous") if ends else None

    def cut(self, text: str, size: int = PIECE) -> Iterator[str]:
        """Pieces of some ``size`` characters. A text that can't be cut safely is one piece."""
        return (text[start:stop] for start, stop in self.spans(text, size))

    def spans(self, text: str, size: int = PIECE) -> Iterator[tuple[int, int]]:
        """Where each piece starts and stops."""
        start = 0
        while self._ends is not None and len(text) - start > size:
            end = start + size
            look = max(start, end - LOOK)
            last = self._last_word_end(text[look:end])
            stop = look + last if last else self._next_cut(text, start, size)
            yield start, stop
            start = stop
        if start < len(text) or not text:
            yield start, len(text)

    def _last_word_end(self, window: str) -> int:
        """The last place in ``window`` where a word certainly ends; 0: none is known."""
        assert self._ends is not None
        return self._ends.pre_tokenize_str(window)[-1][1][0]

    def _next_cut(self, text: str, start: int, size: int) -> int:
        """A place to cut after ``start``, where a word begins; for text of one kind of character, such as punctuation.

        The words from ``start`` on are those of the whole text, apart from the last: what follows may change that one.
        It may also change the lengths of the two or three before it, where they lie in one run of white space.
        """
        while start + size < len(text):
            window = text[start : start + size]
            if self._may_resync:
                ends = self._words(window)
                last = bisect_right(ends, len(window) - MARGIN, hi=max(len(ends) - 3, 0))
                for n in range(last, max(last - TRIES, 0), -1):
                    # White space before other characters is split in another way than white space at the end.
                    if self._words(window[: ends[n - 1]]) == ends[:n]:
                        return start + ends[n - 1]
            elif found := self._last_word_end(window):
                return start + found
            size *= 2
        return len(text)

    def _words(self, text: str) -> list[int]:
        """Where the words of ``text`` end."""
        return [end for _, (_, end) in self._pre_tokenizer.pre_tokenize_str(text)]


def _word_ends(backend: tokenizers.Tokenizer) -> tuple[str, bool]:
    """A pattern whose matches end where a word certainly ends ("": no place is certain), and whether the
    pre-tokenizer alone decides where words end."""
    state = _state(backend.pre_tokenizer)
    steps = state.get("pretokenizers", [state])
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    known_splits = (*map(split_pattern, DIGITS), LLAMA3_SPLIT, QWEN_SPLIT, GPT2_SPLIT, SMOLLM_SPLIT, O200K_SPLIT)
    patterns = [split | {"pattern": {"Regex": pattern}} for pattern in known_splits]
    *splits, bytes_ = steps
    known = (
        bytes_.get("type") == "ByteLevel"
        and not bytes_["add_prefix_space"]
        and (not splits if bytes_.get("use_regex", True) else len(splits) == 1 and splits[0] in patterns)
    )
    normalizer = _state(backend.normalizer).get("type")
    added = list(backend.get_added_tokens_decoder().values())
    whole = all(not any(map(str.isspace, token.content)) for token in added) and not any(
        token.lstrip or token.rstrip or token.single_word for token in added
    )
    if not (known and whole and normalizer in (None, "NFC") and _adds_nothing(_state(backend.post_processor))):
        return "", False
    # Normalization can change a letter, and an added token can hold any character but white space.
    alone = normalizer is None and all(token.special for token in added)
    return (SPACE if splits == patterns[-1:] else WORD_END, True) if alone else (SPACE, False)


def _adds_nothing(post_processor: dict[str, Any]) -> bool:
    return post_processor.get("type") in (None, "ByteLevel")


def _state(component: Any) -> dict[str, Any]:
    """The settings of a part of a tokenizer, as tokenizer.json has them."""
    return {} if component is None else json.loads(component.__getstate__())
