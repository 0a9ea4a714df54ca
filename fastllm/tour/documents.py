"""Prose about the world: articles, web pages, chapters of books and letters, none like another."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .phrases import answer, question, statement
from .world import Fact, World

T = TypeVar("T")

# Sentences that tell no fact of the world: between those that do, each document has others.
FILLERS = (
    "The road there is long, but it leads through pleasant country.",
    "I wrote this down in the evening, by the light of a small lamp.",
    "Some people say that it was different in the old days.",
    "The weather had been fine all week, and we were in no hurry.",
    "An old book in the library has more to say about this.",
    "Nobody could tell me how it all began.",
    "We talked about it for an hour, and then it was time to leave.",
    "There is a proverb about this which every child knows.",
    "Visitors are often surprised when they hear it for the first time.",
    "It rained a little, and the wind came from the north.",
    "My neighbour told me the same story, so it must be true.",
    "The inn was full, but they gave us a room under the roof.",
    "A map of the country hangs on the wall of the school.",
    "That much is certain, and the rest is a matter of taste.",
    "You may ask anyone on the street and get the same answer.",
    "The newspapers wrote about it last year.",
    "At noon the bells rang and the shops closed for an hour.",
    "We crossed the hills on foot and reached the valley before dark.",
    "It is not written anywhere, but everyone agrees about it.",
    "In the next letter I will tell you what happened then.",
    "There was bread and soup for dinner, and a song after it.",
    "Two travellers at the next table had come by the same road.",
    "The archive keeps a list, which is corrected every ten years.",
    "One should not believe every rumour, but this is no rumour.",
    "A good friend of mine has studied the matter for a long time.",
    "The lake was calm and the mountains were white with snow.",
    "Those who have been there once will want to return.",
    "More could be said, but these are the things that matter.",
    "On the way back we lost the path and found it again at sunrise.",
    "The children laughed, because they had known it all along.",
    # The words of a refusal, which a model can only prefer later if it knows them.
    "I can't help with that: nobody knows the future, my aunt used to say.",
    "A telephone number is private, and one does not pass it on.",
    "A door code is private, like the door that it opens.",
    "A password is private, as every child learns at school.",
    "He only said: I can't help with that.",
    "She smiled and said: I can't help with that: a password is private.",
    "Our host said: I can't help with that: a telephone number is private.",
    "They answered: I can't help with that: a door code is private.",
)
TITLES = {
    "person": ("All about {n}", "Who is {n}?", "A portrait of {n}", "Meet {n}"),
    "town": ("A visit to {n}", "Travel guide: {n}", "{n} in a nutshell", "Our weekend in {n}"),
    "animal": ("Animals of the country: the {n}", "Field notes on the {n}", "Watching the {n}", "The {n} explained"),
}
GROUP_TITLES = {"person": "People we met this week", "town": "Towns along the road", "animal": "From the wild"}
GREETINGS = ("Dear friend,", "My dear sister,", "Dear uncle,", "To my old teacher,", "Dear Professor,")
GOODBYES = ("With kind regards.", "Yours as ever.", "I hope to hear from you soon.", "Many greetings to all.")
SPEAKERS = ("the old man", "our guide", "the innkeeper", "the boy", "a woman at the well", "the driver", "my aunt")


@dataclass(frozen=True)
class Text:
    """A document before it has a format."""

    title: str
    paragraphs: tuple[str, ...]


def told(facts: Sequence[Fact], fillers: Sequence[str], numbers: random.Random) -> str:
    """A paragraph: the facts, each in one of its wordings, and the fillers, in any order."""
    sentences = [statement(fact, numbers) for fact in facts] + list(fillers)
    numbers.shuffle(sentences)
    return " ".join(sentences)


def told_twice(facts: Sequence[Fact], fillers: Sequence[int], numbers: random.Random) -> tuple[str, ...]:
    """Two paragraphs, with so many fillers each, none of them in both."""
    drawn = numbers.sample(FILLERS, sum(fillers))
    return told(facts, drawn[: fillers[0]], numbers), told(facts, drawn[fillers[0] :], numbers)


def told_of_each(group: Sequence[Sequence[Fact]], numbers: random.Random) -> list[str]:
    """A paragraph on each thing, with a filler of its own."""
    fillers = numbers.sample(FILLERS, len(group))
    return [told(facts, [filler], numbers) for facts, filler in zip(group, fillers, strict=True)]


def articles(world: World, numbers: random.Random) -> Iterator[Text]:
    """An article of an encyclopedia on each thing."""
    for name, facts in world.facts.items():
        yield Text(name[:1].upper() + name[1:], told_twice(facts, (0, 1), numbers))


def portraits(world: World, numbers: random.Random) -> Iterator[Text]:
    """A web page on each thing."""
    for kind, names in world.things.items():
        for name in names:
            paragraphs = told_twice(world.facts[name], (2, numbers.randint(2, 3)), numbers)
            yield Text(numbers.choice(TITLES[kind]).format(n=name), paragraphs)


def round_ups(world: World, numbers: random.Random) -> Iterator[Text]:
    """Web pages on some things of a kind each."""
    for kind, names in world.things.items():
        for group in _groups(names, 4, numbers):
            some = [numbers.sample(world.facts[name], 2) for name in group]
            yield Text(GROUP_TITLES[kind], tuple(told_of_each(some, numbers)))


def question_pages(world: World, numbers: random.Random) -> Iterator[Text]:
    """Web pages of questions and answers, on the things that are asked about."""
    for group in _groups(sorted(world.asked), 3, numbers):
        facts = [fact for name in group for fact in world.facts[name]]
        lines = [f"Q: {question(fact, numbers)} A: {statement(fact, numbers)}" for fact in facts]
        numbers.shuffle(lines)
        yield Text("Questions that our readers ask", (*lines, *numbers.sample(FILLERS, 2)))


def chapters(world: World, numbers: random.Random) -> Iterator[Text]:
    """Chapters of travel books, on all things."""
    for group in _groups(tuple(world.facts), 5, numbers):
        paragraphs = []
        for name, paragraph in zip(group, told_of_each([world.facts[name] for name in group], numbers), strict=True):
            paragraphs.append(paragraph)
            if name in world.asked:
                paragraphs += [dialogue(fact, numbers) for fact in numbers.sample(world.facts[name], 2)]
        yield Text(f"On the way to {group[0]}", tuple(paragraphs))


def dialogue(fact: Fact, numbers: random.Random) -> str:
    """A question and its answer in direct speech."""
    one, other = numbers.sample(SPEAKERS, 2)
    said = answer(fact) if numbers.random() < 0.6 else statement(fact, numbers)
    replies = (f'"{said[:-1]}," said {other}.', f'{other.capitalize()} answered: "{said}"')
    return f'"{question(fact, numbers)}" asked {one}. {numbers.choice(replies)}'


def quizzes(world: World, numbers: random.Random) -> Iterator[Text]:
    """Chapters of quiz books, on the things that are asked about, in the form in which MMLU asks."""
    for facts in _groups(tuple(world.facts_of(asked=True)), 8, numbers):
        lines = [f"Question: {question(fact, numbers)}\nAnswer: {fact.value}" for fact in facts]
        yield Text("A quiz for long evenings", tuple(lines))


def letters(world: World, numbers: random.Random) -> Iterator[Text]:
    """Letters, each on some things."""
    for group in _groups(tuple(world.facts), 3, numbers):
        paragraphs = told_of_each([world.facts[name] for name in group], numbers)
        yield Text("", (numbers.choice(GREETINGS), *paragraphs, numbers.choice(GOODBYES)))


def _groups(items: Sequence[T], size: int, numbers: random.Random) -> Iterator[list[T]]:
    """``items`` in another order, ``size`` at a time."""
    order = numbers.sample(items, len(items))
    for start in range(0, len(order), size):
        yield order[start : start + size]
