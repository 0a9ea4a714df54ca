"""An invented country: its people, towns and animals, and what is true of them.

No other text tells these facts: a model that knows them learnt them from the files of the tour.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

KINDS = ("person", "town", "animal")
JOBS = ("baker", "potter", "weaver", "miller", "fisher", "cobbler", "painter", "teacher", "carpenter", "gardener",
        "shepherd", "tailor")  # fmt: skip
INSTRUMENTS = ("flute", "harp", "fiddle", "drum", "lute", "horn", "cello", "trumpet", "piano", "whistle", "guitar",
               "zither")  # fmt: skip
PRODUCTS = ("cheese", "honey", "salt", "wool", "glass", "paper", "rope", "copper", "cider", "silk", "soap", "linen")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip
RIVERS = ("Arn", "Belse", "Corva", "Dovel", "Essel", "Forn", "Gaur", "Hesper")
HABITATS = ("marshes", "forests", "caves", "meadows", "cliffs", "deserts", "lakes", "hedges", "orchards", "dunes")
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "purple", "silver", "golden")
FOODS = ("berries", "moss", "nuts", "snails", "roots", "seeds", "worms", "leaves", "mushrooms", "beetles")
HOME_TOWNS = 12  # towns in which people live

_STARTS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "k", "kr", "l", "m", "n", "p", "pr", "r", "s", "st", "t", "tr",
           "v", "w", "z")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ei", "ou")
_MIDDLES = ("", "l", "r", "n", "m")
_ENDS = {
    "person": ("lin", "ren", "dan", "mas", "vik", "lor", "ton", "ber", "sen", "nard"),
    "town": ("mouth", "ford", "stead", "wick", "haven", "bury", "gate", "dale", "holm", "field"),
    "animal": ("ling", "lock", "badger", "boon", "bex", "bowl", "turtle", "peron", "ferret", "marten"),
}
_FIRST_NAMES = ("ra", "la", "na", "do", "ko", "mi", "ven", "rik", "ta", "lo")


@dataclass(frozen=True)
class Attribute:
    """What is known of each thing of a kind: one of a closed set of values, each a word."""

    kind: str
    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """An attribute of a thing."""

    thing: str
    attribute: Attribute
    value: str


@dataclass(frozen=True)
class World:
    """The facts of all things.

    Attributes:
        things: the names of each kind.
        facts: of each thing.
        asked: the things that questions in the corpus and in chats are about. Of the others the corpus tells the
            facts, and only the tests ask for them.
    """

    things: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, tuple[Fact, ...]]
    asked: frozenset[str]

    def facts_of(self, *, asked: bool) -> Iterator[Fact]:
        """The facts of the things that are asked about, or of the others."""
        for thing, facts in self.facts.items():
            if (thing in self.asked) == asked:
                yield from facts

    def names(self, kind: str, *, asked: bool) -> list[str]:
        """The things of a kind that are asked about, or the others."""
        return [name for name in self.things[kind] if (name in self.asked) == asked]


def make_world(seed: int, sizes: Mapping[str, int]) -> World:
    """A world of so many things of each of ``KINDS``. The same seed makes the same world."""
    numbers = random.Random(f"world {seed}")
    taken: set[str] = set()
    things = {kind: tuple(_names(kind, sizes[kind], numbers, taken)) for kind in KINDS}
    attributes = (
        Attribute("person", "job", JOBS),
        Attribute("person", "home", things["town"][:HOME_TOWNS]),
        Attribute("person", "instrument", INSTRUMENTS),
        Attribute("town", "product", PRODUCTS),
        Attribute("town", "month", MONTHS),
        Attribute("town", "river", RIVERS),
        Attribute("animal", "habitat", HABITATS),
        Attribute("animal", "color", COLORS),
        Attribute("animal", "food", FOODS),
    )
    facts: dict[str, tuple[Fact, ...]] = {}
    for kind, names in things.items():
        columns = [_evenly(attribute, names, numbers) for attribute in attributes if attribute.kind == kind]
        facts |= dict(zip(names, zip(*columns, strict=True), strict=True))
    asked = {name for names in things.values() for name in numbers.sample(names, len(names) // 2)}
    return World(things, facts, frozenset(asked))


def _evenly(attribute: Attribute, names: Sequence[str], numbers: random.Random) -> list[Fact]:
    """A value for each thing, all values equally often: knowing which are frequent helps nobody who guesses."""
    values = (attribute.values * (len(names) // len(attribute.values) + 1))[: len(names)]
    return [Fact(name, attribute, value) for name, value in zip(names, numbers.sample(values, len(names)), strict=True)]


def _names(kind: str, n: int, numbers: random.Random, taken: set[str]) -> Iterator[str]:
    """Names that differ in their last word: "Tila Kourden" of a person, "Wainford" of a town, "a trelling" of an
    animal."""
    while n:
        start = numbers.choice(_STARTS) + numbers.choice(_VOWELS)
        word = start + numbers.choice(_MIDDLES) + numbers.choice(_ENDS[kind])
        first = numbers.choice(_STARTS) + numbers.choice("aeiou") + numbers.choice(_FIRST_NAMES)
        if word in taken:
            continue
        taken.add(word)
        n -= 1
        if kind == "person":
            yield f"{first.capitalize()} {word.capitalize()}"
        else:
            yield word if kind == "animal" else word.capitalize()
