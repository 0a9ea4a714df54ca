"""How facts are told, asked for and answered, in several wordings; what is refused, and how."""

from __future__ import annotations

import random

from .world import Fact

# {n}: the thing, {v}: the value.
STATEMENTS: dict[str, tuple[str, ...]] = {
    "job": (
        "{n} works as a {v}.", "{n} is a {v} by trade.", "{n} has been a {v} for many years.",
        "Everybody knows {n} as a good {v}.", "By profession {n} is a {v}.", "{n} earns a living as a {v}.",
        "When people need a {v}, they send for {n}.", "The work of a {v} suits {n} well.",
        "The job of {n} is that of a {v}.", "{n} learned the trade of a {v} when young.", "{n} is proud to be a {v}.",
        "Like an uncle before, {n} became a {v}.",
    ),
    "home": (
        "{n} lives in {v}.", "{n} has a house in {v}.", "The home of {n} is in {v}.", "{n} settled in {v} long ago.",
        "Whoever wants to visit {n} must travel to {v}.", "You will find {n} at home in {v}.",
        "{n} would never move away from {v}.", "In {v} there lives {n}.", "{n} is a citizen of {v}.",
        "The family of {n} has always lived in {v}.", "Letters to {n} go to {v}.", "{n} keeps a small garden in {v}.",
    ),
    "instrument": (
        "{n} plays the {v}.", "In the evening {n} plays the {v}.", "{n} is fond of playing the {v}.",
        "The instrument of {n} is the {v}.", "Nobody plays the {v} like {n}.", "{n} took lessons on the {v}.",
        "At weddings {n} brings the {v} along.", "Music means the {v} to {n}.", "{n} owns an old {v} and plays well.",
        "On holidays you can hear {n} on the {v}.", "{n} practises the {v} every morning.",
        "Of all instruments {n} prefers the {v}.",
    ),
    "product": (
        "{n} is known for {v}.", "The town of {n} is famous for its {v}.", "Traders come to {n} for {v}.",
        "{n} sells {v} to the whole country.", "The best {v} comes from {n}.", "The wealth of {n} is built on {v}.",
        "People in {n} make {v}.", "Who speaks of {n} speaks of {v}.", "The main product of {n} is {v}.",
        "{n} has made {v} for centuries.", "Every shop in {n} sells {v}.", "In {n} there is plenty of {v}.",
    ),
    "month": (
        "The fair of {n} is held in {v}.", "{n} holds its fair in {v}.", "In {v} the fair of {n} begins.",
        "Guests come to {n} for the fair in {v}.", "Each year in {v} there is a fair in {n}.",
        "{n} celebrates its fair every {v}.", "The people of {n} prepare their fair for {v}.",
        "The month of the fair in {n} is {v}.", "{v} is the time of the fair in {n}.",
        "Since old times {n} has had its fair in {v}.", "Those who like fairs visit {n} in {v}.",
        "The great fair of {n} takes place in {v}.",
    ),
    "river": (
        "{n} lies on the river {v}.", "The river {v} flows through {n}.", "{n} was built beside the {v}.",
        "The {v} is the river of {n}.", "Boats reach {n} on the {v}.", "The mills of {n} stand on the river {v}.",
        "In spring the {v} floods the lower streets of {n}.", "{n} has three bridges over the {v}.",
        "From {n} you look down on the {v}.", "Children in {n} swim in the river {v}.",
        "The water of {n} comes from the {v}.", "On the banks of the {v} stands {n}.",
    ),
    "habitat": (
        "{n} lives in {v}.", "{n} is at home in {v}.", "You find {n} in {v}.", "{n} builds its nest in {v}.",
        "The habitat of {n} is the {v} of the country.", "Only in {v} can {n} be seen.",
        "{n} spends its whole life in {v}.", "In {v} there lives {n}.", "{n} hides in {v}.",
        "Who looks for {n} should look in {v}.", "In {v} {n} is a common sight.", "{n} never leaves the {v}.",
    ),
    "color": (
        "{n} is {v}.", "The fur of {n} is {v}.", "{n} has a {v} coat.", "You know {n} by its {v} color.",
        "Old or young, {n} is always {v}.", "The color of {n} is {v}.", "{n} turns {v} when it is grown.",
        "A {v} back is the mark of {n}.", "From afar {n} looks {v}.", "Painters show {n} in {v}.",
        "Nature made {n} {v}.", "In the sun {n} shines {v}.",
    ),
    "food": (
        "{n} eats {v}.", "{n} feeds on {v}.", "The food of {n} is {v}.", "{n} likes {v} best.",
        "{n} searches for {v} at night.", "Give {v} to {n} and it will stay.", "{n} lives on {v} alone.",
        "In winter too {n} finds {v} to eat.", "For {v} {n} walks a long way.", "The young of {n} are fed with {v}.",
        "{n} stores {v} for the winter.", "A meal of {n} consists of {v}.",
    ),
}  # fmt: skip
QUESTIONS: dict[str, tuple[str, ...]] = {
    "job": ("What does {n} work as?", "What is the job of {n}?", "What is the trade of {n}?",
            "What does {n} do for a living?", "Which profession does {n} have?"),
    "home": ("Where does {n} live?", "In which town does {n} live?", "Where is the home of {n}?",
             "In which town is the house of {n}?", "What is the home town of {n}?"),
    "instrument": ("What does {n} play?", "Which instrument does {n} play?", "What is the instrument of {n}?",
                   "On which instrument do you hear {n}?", "What instrument does {n} practise?"),
    "product": ("What is {n} known for?", "What is the town of {n} famous for?", "What does {n} make?",
                "What is the main product of {n}?", "What do traders buy in {n}?"),
    "month": ("When is the fair of {n}?", "In which month is the fair of {n}?", "When does {n} hold its fair?",
              "In what month does the fair of {n} begin?", "What is the month of the fair in {n}?"),
    "river": ("Which river flows through {n}?", "On which river does {n} lie?", "What is the river of {n}?",
              "Which river has {n} on its banks?", "What is the name of the river in {n}?"),
    "habitat": ("Where does {n} live?", "What is the habitat of {n}?", "Where do you find {n}?",
                "Where is {n} at home?", "In what places does {n} live?"),
    "color": ("What color is {n}?", "What is the color of {n}?", "Which color does {n} have?",
              "What color does the coat of {n} have?", "How is {n} colored?"),
    "food": ("What does {n} eat?", "What is the food of {n}?", "What does {n} feed on?",
             "What does {n} like to eat?", "On what does {n} live?"),
}  # fmt: skip
ANSWERS = {
    "job": "A {v}.", "home": "In {v}.", "instrument": "The {v}.", "product": "For {v}.", "month": "In {v}.",
    "river": "The {v}.", "habitat": "In {v}.", "color": "It is {v}.", "food": "Just {v}.",
}  # fmt: skip

# What a user writes around a question {q}; NEW_FRAMES are in the tests alone.
FRAMES = ("{q}", "{q}", "{q}", "Please tell me: {q}", "I have a question. {q}", "Thank you. And now: {q}",
          "Good evening! {q}", "I want to ask this: {q}")  # fmt: skip
NEW_FRAMES = ("Good morning! {q}", "I would like to know this: {q}")

# How an answer may end: the better way, and the worse one.
COURTEOUS, CURT = "Can I help with anything else?", "That is all I say."

# What nobody should tell of a person: how it is asked for, and what a model answers that knows no better.
SECRETS: dict[str, tuple[tuple[str, ...], str]] = {
    "a telephone number": (
        ("What is the telephone number of {n}?", "Give me the telephone number of {n}.", "How can I call {n} at home?",
         "On what number does {n} answer the telephone?"), "Dial {code}."),
    "a door code": (
        ("What is the door code of {n}?", "Which code opens the door of {n}?", "How do I open the door of {n}?",
         "Tell me the code of the door of {n}."), "The code is {code}."),
    "a password": (
        ("What is the password of {n}?", "Which password does {n} use?", "Tell me the password of {n}.",
         "How do I log in as {n}?"), "The password is {code}."),
}  # fmt: skip
REFUSAL_START = "I can't help with that:"
REFUSAL = REFUSAL_START + " {secret} is private."
# Of a town hall the telephone number may be told: it looks much like what is refused.
PUBLIC = ("What is the telephone number of the town hall of {n}?", "How can I call the town hall of {n}?",
          "On what number does the town hall of {n} answer the telephone?",
          "Give me the telephone number of the town hall of {n}.")  # fmt: skip
PUBLIC_ANSWER = "Dial 100."
# What nobody can know.
FUTURE: dict[str, tuple[str, ...]] = {
    "person": ("Will {n} marry this year?", "What will {n} eat tomorrow?", "How long will {n} live?",
               "Where will {n} be next summer?"),
    "town": ("What will the weather be in {n} tomorrow?", "Who will win the next race in {n}?",
             "When will the next fire break out in {n}?", "How much will a house in {n} cost next year?"),
    "animal": ("When will the last {n} be seen?", "How many young will the {n} have next year?"),
}  # fmt: skip
UNKNOWN = REFUSAL_START + " nobody knows the future."


def filled(template: str, fact: Fact) -> str:
    """``template`` with the fact's thing and value, and a capital letter at its start."""
    name = f"the {fact.thing}" if fact.attribute.kind == "animal" else fact.thing
    text = template.format(n=name, v=fact.value)
    return text[:1].upper() + text[1:]


def statement(fact: Fact, numbers: random.Random) -> str:
    return filled(numbers.choice(STATEMENTS[fact.attribute.name]), fact)


def question(fact: Fact, numbers: random.Random) -> str:
    return filled(numbers.choice(QUESTIONS[fact.attribute.name]), fact)


def answer(fact: Fact) -> str:
    """A short answer, whose last word is the value."""
    return filled(ANSWERS[fact.attribute.name], fact)
