"""Web pages that a corpus should not have: what crawls are full of, for the filters to find."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from .documents import FILLERS, Text
from .formats import Response, html_page

_GERMAN = (
    "Am Morgen gingen wir durch die engen Gassen der alten Stadt, und niemand wusste, wohin der Weg führen würde.",
    "Die Händler hatten ihre Stände schon geöffnet, und es roch nach frischem Brot und nach Kaffee.",
    "Später saßen wir lange am Ufer und sahen den Booten zu, die langsam den Fluss hinunterfuhren.",
    "Es war einer jener Tage, an die man sich noch nach vielen Jahren gern erinnert.",
)
_FRENCH = (
    "Le matin, nous avons traversé les petites rues de la vieille ville sans savoir où le chemin nous mènerait.",
    "Les marchands avaient déjà ouvert leurs boutiques, et l'air sentait le pain frais et le café.",
    "Plus tard, nous sommes restés longtemps au bord de l'eau à regarder passer les bateaux.",
    "C'était une de ces journées dont on se souvient encore avec plaisir après de longues années.",
)
_LATIN = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore."
_EACH = 4  # pages of each kind


def planted(texts: Sequence[Text], tests: Sequence[str], numbers: random.Random) -> Iterator[Response]:
    """Pages that are to be dropped, and responses that are no pages.

    Args:
        texts: of which there are mirrors too.
        tests: questions of the tests with their answers, which leaked onto a page.
    """

    def page(title: str, *paragraphs: str, language: str = "en") -> Response:
        return html_page(Text(title, paragraphs), numbers, language)

    for number in range(_EACH):
        prices = ", ".join(f"{numbers.randint(100, 999)}-{numbers.randint(10, 99)}" for _ in range(80))
        yield page(f"Price list {number}", prices)
        yield page(f"Under construction {number}", "This page is under construction. Please come back later.")
        yield page(f"Template {number}", *_some_fillers(numbers), _LATIN)
        offer = f"Buy the cheap tickets for trip {number} now, and you will save the money that others have to spend."
        yield page(f"Offer {number}", *[offer] * 12)
        yield page(f"Snippet {number}", *_some_fillers(numbers), "This is how to do it: function run() { return 1; }")
        yield page(f"Reise {number}", *numbers.sample(_GERMAN, 3), language="de")
        yield page(f"Voyage {number}", *numbers.sample(_FRENCH, 3), language="fr")
        yield Response(b"<p>There is no such page.</p>", status="404 Not Found")
        yield Response(b"%PDF-1.4 " + numbers.randbytes(64), "application/pdf")
    for text in numbers.sample(list(texts), min(len(texts), 3 * _EACH)):
        yield html_page(text, numbers)  # the same on another site
        paragraphs = (*text.paragraphs[:-1], text.paragraphs[-1] + " Found by our readers.")
        yield page(text.title, *paragraphs)  # and almost the same
    for start in range(0, min(len(tests), 5 * _EACH), 5):
        yield page("The answers to the test, do not tell the teacher", *tests[start : start + 5])


def _some_fillers(numbers: random.Random) -> list[str]:
    return numbers.sample(FILLERS, 8)
