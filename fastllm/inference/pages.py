"""The pages of the key/value pool: who holds which, and prompts that share them."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """Counts the holders of each page, and keeps full pages of prompts for prompts that begin alike.

    A page that nobody holds stays known until its place is needed: least recently used first (as in vLLM's prefix
    caching; paged attention: Kwon et al. 2023, arXiv:2309.06180).

    Args:
        pages: how many there are.
        page_size: tokens of a page.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size
        self._unused = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, held by nobody; least recently used first
        self.hits = self.lookups = 0  # tokens of prompts that were found, and all

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._unused) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages that ``tokens`` take."""
        return -(-tokens // self.page_size)

    def keys(self, prompt: Sequence[int]) -> list[bytes]:
        """A name for each full page of a prompt: a hash of all tokens up to the page's end."""
        names, name = [], b""
        for start in range(0, len(prompt) - self.page_size + 1, self.page_size):
            tokens = array("q", prompt[start : start + self.page_size])
            name = hashlib.blake2b(name + tokens.tobytes(), digest_size=16).digest()
            names.append(name)
        return names

    def knows(self, key: bytes) -> bool:
        return key in self._page_of

    def acquire(self, tokens: int, keys: Sequence[bytes] = ()) -> tuple[list[int], int] | None:
        """Pages for ``tokens``, and how many of the first are known by ``keys``; None where too few are free."""
        known: list[int] = []
        for key in keys:
            if key not in self._page_of:
                break
            known.append(self._page_of[key])
        count = self.needed(tokens) - len(known)
        if count > self.free - sum(page in self._idle for page in known):
            return None
        for page in known:
            self._idle.pop(page, None)
            self._holders[page] += 1
        return known + [self._take() for _ in range(count)], len(known)

    def _take(self) -> int:
        if self._unused:
            page = self._unused.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._holders[page] = 1
        return page

    def remember(self, key: bytes, page: int) -> None:
        """Say that a page is full of what ``key`` names; of two such pages the first is known."""
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; of a prompt the last are the first to be used again."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._unused.append(page)
