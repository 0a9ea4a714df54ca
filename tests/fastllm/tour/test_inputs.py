"""What the tour writes before its first command: the world, the sources, the questions, the chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fastllm.data.readers import ReaderOptions, Seen, open_source
from fastllm.data.readers.base import Skipped
from fastllm.evaluation import Options, find_tasks, prepare
from fastllm.tour.sizes import QUICK
from fastllm.tour.stages import PROMPTS, QUESTIONS, SOURCES, TUNING, write_inputs
from fastllm.tour.world import make_world
from tests.fastllm.evaluation import small

THINGS = QUICK.things


@pytest.fixture(scope="module")
def world():
    return make_world(0, THINGS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tour")
    write_inputs(folder, QUICK, 0)
    return folder


class NoProblems:
    def skipped(self, reason: str, n: int = 1) -> None:
        pass

    def problem(self, where: str, message: str) -> None:
        raise AssertionError(f"{where}: {message}")


def texts(folder: Path) -> Iterator[str]:
    for name in sorted(folder.iterdir()):
        for source in open_source(str(name), ReaderOptions(), Seen()):
            for record in source.records(NoProblems()):
                with suppress(Skipped):  # an error page of the crawl
                    yield source.extract(record).text


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_seed_makes_a_world(world):
    assert make_world(0, THINGS) == world
    assert make_world(1, THINGS) != world
    names = [name for names in world.things.values() for name in names]
    assert len({*names}) == len(names) == sum(THINGS.values())
    assert 2 * len(world.asked) == len(names)
    for fact in (*world.facts_of(asked=True), *world.facts_of(asked=False)):
        assert fact.value in fact.attribute.values


def test_a_seed_makes_the_inputs(inputs, tmp_path):
    write_inputs(tmp_path, QUICK, 0)
    for name in ("questions/answers.jsonl", "tuning/chats.jsonl", "tuning/pairs.jsonl", "sources/web.warc.gz"):
        assert (tmp_path / name).read_bytes() == (inputs / name).read_bytes(), name


def test_the_sources_tell_all_facts(inputs, world):
    """As the readers of the pipeline read them: a WARC, a dump, books and texts."""
    together = " ".join(texts(inputs / SOURCES)).lower()
    sentences = [sentence for sentence in together.replace("\n", ". ").split(".") if sentence]
    by_thing: dict[str, str] = {}
    for thing in world.facts:
        by_thing[thing] = " | ".join(sentence for sentence in sentences if thing.lower() in sentence)
    facts = [*world.facts_of(asked=True), *world.facts_of(asked=False)]
    told = sum(fact.value.lower() in by_thing[fact.thing] for fact in facts)
    assert told >= 0.97 * len(facts)  # of some the name stands in the sentence before


def test_no_question_of_the_tests_is_in_the_sources(inputs, world):
    """But in the pages that leaked, which the pipeline drops."""
    asked = [row.partition(",")[0].strip('"') for path in (inputs / QUESTIONS / "mmlu/test").glob("*.csv")
             for row in path.read_text().splitlines()]  # fmt: skip
    found = [text for text in texts(inputs / SOURCES) if any(question in text for question in asked)]
    assert len(asked) > 50
    assert 0 < len(found) <= 8
    for text in found:  # a page that quotes tests, with their choices
        assert ": A." in text or ": B." in text or ": C." in text or ": D." in text


def test_tuning_and_tests_share_no_thing(inputs, world):
    """Nobody asks in a chat or a pair for what a test asks for; a town may be an answer."""
    others = [name for kind in world.things for name in world.names(kind, asked=False)]
    chats, pairs = (rows(inputs / TUNING / name) for name in ("chats.jsonl", "pairs.jsonl"))
    asked = [turn["content"] for chat in chats for turn in chat["messages"] if turn["role"] == "user"]
    asked += [pair["prompt"] for pair in pairs]
    words = {word.strip(".,?!") for text in asked for word in text.split()}
    assert not [other for other in others if other.split()[-1] in words]
    for name in ("answers.jsonl", "forbidden.jsonl"):
        for row in rows(inputs / QUESTIONS / name):
            assert any(other in row["question"] for other in others), row


def test_the_questions_are_tasks(inputs):
    """All are read by ``fastllm eval``; the right answer is one of four different ones."""
    model = small.model(512, chat=True)
    for path in sorted((inputs / QUESTIONS).glob("*.toml")):
        (task,) = find_tasks([str(path)])
        assert prepare(task, None, model.tokenizer, model.max_seq_len, Options()).items
    subjects = tuple(path.name.removesuffix("_test.csv") for path in (inputs / QUESTIONS / "mmlu/test").glob("*.csv"))
    (task,) = find_tasks(["mmlu_continuation"], subjects)
    made = prepare(task, inputs / QUESTIONS / "mmlu", model.tokenizer, model.max_seq_len, Options())
    assert len(made.items) > 50
    assert all(len({*item.question.choices}) == 4 for item in made.items)
    assert {item.question.gold for item in made.items} == {0, 1, 2, 3}
    assert all(row["messages"][-1]["role"] == "user" for row in rows(inputs / PROMPTS))
