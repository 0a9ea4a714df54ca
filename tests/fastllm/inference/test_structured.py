from __future__ import annotations

import json
import re

import pytest

from fastllm.errors import ParameterError, UserError
from fastllm.inference import Engine, SamplingParams, json_schema, regex
from fastllm.inference.structured import JSON_OBJECT

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 3, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(gpt, tokenizer) -> Engine:
    return Engine(gpt, tokenizer, max_batch=8)


def test_answers_fit_a_schema(engine):
    """Of a model that says anything; in one batch with answers of other forms and of none."""
    grammars = [json_schema(SCHEMA), regex(r"[ab]{3}(-\d\d)+!"), None]
    requests = []
    for seed in range(6):
        for grammar in grammars:
            params = SamplingParams(max_tokens=90, seed=seed, grammar=grammar, top_k=40 * (seed % 2))
            requests += engine.add(engine.prompt("def"), params)
    while engine.busy:
        engine.step()
    for i, request in enumerate(requests):
        found = request.completion()
        if i % 3 == 0 and found.finish_reason == "stop":
            value = json.loads(found.text)
            assert set(value) == {"name", "age"}
            assert len(value["name"]) <= 5 and 3 <= value["age"] <= 99
        elif i % 3 == 1:
            assert found.finish_reason == "length" or re.fullmatch(r"[ab]{3}(-\d\d)+!", found.text)
    assert sum(r.finish_reason == "stop" for r in requests[::3]) >= 4


def test_any_object_and_speculation(gpt, tokenizer):
    """With speculation the same answers: what is guessed past the form is not chosen."""
    options = {"grammar": regex(r"(ab ){2,30}c"), "max_tokens": 60, "seed": 1}
    plain = Engine(gpt, tokenizer).generate(["x", "y"], **options)
    guessed = Engine(gpt, tokenizer, speculate=3)
    assert [c.tokens for c in guessed.generate(["x", "y"], **options)] == [c.tokens for c in plain]
    assert guessed.stats.accepted_tokens > 0
    (found,) = Engine(gpt, tokenizer).generate(["x"], grammar=json_schema(JSON_OBJECT), max_tokens=40, seed=2)
    assert found.text.lstrip().startswith("{")


def test_a_space_at_the_end_of_the_prompt(engine):
    """Nothing of a form is taken for the prompt's space."""
    for seed in range(5):
        (found,) = engine.generate(["def "], grammar=regex(" ?[ab]{3}"), seed=seed, max_tokens=9)
        assert re.fullmatch(" ?[ab]{3}", found.text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regex("(a"), "the regex can't be used"),
        (lambda: regex("(?=a)b"), "the regex can't be used"),
        (lambda: json_schema({"type": "nothing"}), "the json_schema can't be used"),
        (lambda: json_schema({"$ref": "http://127.0.0.1/x"}), "the json_schema can't be used"),
        (lambda: regex("a" * 2**19), "longer than 262,144 characters"),
    ],
)
def test_forms_that_cannot_be_enforced(make, message):
    with pytest.raises(ParameterError, match=message) as caught:
        make()
    assert caught.value.name == "response_format"
    assert isinstance(caught.value, UserError)
