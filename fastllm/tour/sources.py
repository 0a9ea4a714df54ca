"""The raw sources of the tour, written to a folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..files import write_atomic
from . import documents
from .documents import Text
from .formats import html_page, write_dump, write_epub, write_warc
from .machine_text import machine_texts
from .planted import planted
from .sizes import Size
from .world import World

WEB, WIKI, BOOKS, TEXTS = "web.warc.gz", "wiki.xml.bz2", "books", "texts"
CHAPTERS = 12  # of a book


def write_sources(folder: Path, world: World, size: Size, seed: int, tests: Sequence[str]) -> None:
    """A crawl, a dump of an encyclopedia, books and text files.

    Args:
        tests: questions of the tests with their answers, which leaked into the crawl.
    """
    numbers = random.Random(f"sources {seed}")
    (folder / BOOKS).mkdir(parents=True)
    (folder / TEXTS).mkdir()

    def rounds(n: int, *makers: Callable[[World, random.Random], Iterator[Text]]) -> list[Text]:
        return [text for _ in range(n) for make in makers for text in make(world, numbers)]

    pages = rounds(size.rounds, documents.portraits, documents.round_ups, documents.question_pages)
    responses = [html_page(text, numbers) for text in pages]
    numbers.shuffle(responses)  # mirrors of pages stand behind these: of two the first is kept
    write_warc(folder / WEB, [*responses, *planted(pages, tests, numbers)], numbers)
    write_dump(folder / WIKI, rounds(1, documents.articles))
    books = {
        "travels": rounds(size.rounds, documents.chapters),
        "quiz": rounds(2 * size.rounds, documents.quizzes),
    }
    for name, chapters in books.items():
        numbers.shuffle(chapters)
        for number, start in enumerate(range(0, len(chapters), CHAPTERS)):
            title = f"{name.capitalize()}, volume {number + 1}"
            write_epub(folder / BOOKS / f"{name}-{number:02}.epub", title, chapters[start : start + CHAPTERS])
    _write_texts(folder / TEXTS, "letter", rounds(size.rounds, documents.letters))
    _write_texts(folder / TEXTS, "machine", machine_texts(size.machine_characters))


def _write_texts(folder: Path, name: str, texts: Iterable[Text]) -> None:
    for number, text in enumerate(texts):
        paragraphs = [text.title, *text.paragraphs] if text.title else text.paragraphs
        write_atomic(folder / f"{name}-{number:04}.txt", ("\n\n".join(paragraphs) + "\n").encode())
