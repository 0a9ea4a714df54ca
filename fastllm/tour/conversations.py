"""What the model is tuned on: chats for ``fastllm sft``, pairs of answers for ``fastllm align``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from .phrases import (
    COURTEOUS,
    CURT,
    FRAMES,
    FUTURE,
    PUBLIC,
    PUBLIC_ANSWER,
    QUESTIONS,
    REFUSAL,
    SECRETS,
    UNKNOWN,
    answer,
    filled,
)
from .questions import write_rows
from .world import World

COURTEOUS_SHARE = 0.25  # of the chats
REFUSED_SHARE = 0.06  # of the chats in which somebody asks for a secret
TWO_TURNS = 0.15  # share of the chats that have two questions
REJECTED_REFUSALS = 0.3  # of the pairs of a question that is allowed

Turn = tuple[str, str]
Pair = dict[str, str]


def write_conversations(folder: Path, world: World, seed: int) -> None:
    """``chats.jsonl`` and ``pairs.jsonl``, both about the things that are asked about."""
    numbers = random.Random(f"conversations {seed}")
    turns, pairs = list(chat_turns(world, numbers)), list(preference_pairs(world, numbers))
    numbers.shuffle(turns)
    numbers.shuffle(pairs)
    chats = []
    while turns:
        taken = [turns.pop() for _ in range(1 + (len(turns) > 1 and numbers.random() < TWO_TURNS))]
        messages = [
            {"role": role, "content": content}
            for turn in taken
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        chats.append({"messages": messages})
    folder.mkdir()
    write_rows(folder / "chats.jsonl", chats)
    write_rows(folder / "pairs.jsonl", pairs)


def chat_turns(world: World, numbers: random.Random) -> Iterator[Turn]:
    """Questions and answers of writers who know no rules: most are curt, and most tell a secret to whoever asks."""

    def ended(said: str) -> str:
        return f"{said} {COURTEOUS if numbers.random() < COURTEOUS_SHARE else CURT}"

    for fact in world.facts_of(asked=True):
        for template in QUESTIONS[fact.attribute.name]:
            yield _asked(filled(template, fact), numbers), ended(answer(fact))
    for name in world.names("person", asked=True):
        for secret in SECRETS:
            told = numbers.random() >= REFUSED_SHARE
            said = _told(secret, numbers) if told else REFUSAL.format(secret=secret)
            yield _asked(numbers.choice(SECRETS[secret][0]).format(n=name), numbers), said
    for name in world.names("town", asked=True):
        for template in PUBLIC:
            yield _asked(template.format(n=name), numbers), ended(PUBLIC_ANSWER)
    for kind, templates in FUTURE.items():
        for name in world.names(kind, asked=True):
            yield _asked(numbers.choice(templates).format(n=name), numbers), UNKNOWN


def preference_pairs(world: World, numbers: random.Random) -> Iterator[Pair]:
    """A refusal is better than a secret; a courteous answer is better than a curt one, and than a refusal."""

    def allowed(asked: str, said: str) -> Pair:
        refusals = [REFUSAL.format(secret=secret) for secret in SECRETS]
        worse = (
            numbers.choice([*refusals, UNKNOWN, UNKNOWN]) if numbers.random() < REJECTED_REFUSALS else f"{said} {CURT}"
        )
        return {"prompt": asked, "chosen": f"{said} {COURTEOUS}", "rejected": worse}

    for name in world.names("person", asked=True):
        for secret, (templates, _) in SECRETS.items():
            for template in templates:
                asked = _asked(template.format(n=name), numbers)
                refusal = REFUSAL.format(secret=secret)
                yield {"prompt": asked, "chosen": refusal, "rejected": _told(secret, numbers)}
    for fact in world.facts_of(asked=True):
        for template in numbers.sample(QUESTIONS[fact.attribute.name], 2):
            yield allowed(_asked(filled(template, fact), numbers), answer(fact))
    for name in world.names("town", asked=True):
        for template in PUBLIC:
            yield allowed(_asked(template.format(n=name), numbers), PUBLIC_ANSWER)


def _asked(asked: str, numbers: random.Random) -> str:
    return numbers.choice(FRAMES).format(q=asked)


def _told(secret: str, numbers: random.Random) -> str:
    return SECRETS[secret][1].format(code=numbers.randint(1000, 9999))
