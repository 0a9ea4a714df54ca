"""The openai package against a server."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pydantic
import pytest

from fastllm.data.tokenizer import Tokenizer

from .conftest import HELLO, POISON, Running

OPTIONS = ("--max-batch", 8, "--quiet")


def test_chat(client):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, extra_body={"ignore_eos": True})
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 9


def test_a_streamed_chat_is_the_same(client):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "temperature": 0, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    *parts, last = chunks
    assert not last.choices
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(part.usage is None for part in parts)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts][-1] == whole.choices[0].finish_reason
    assert all(part.choices[0].finish_reason is None for part in parts[:-1])


def test_without_include_usage_no_chunk_has_it(client):
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_the_async_client_and_many_at_once(server: Running):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = [
                client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": f"number {i % 3}"}],
                    max_tokens=20,
                    temperature=0,
                )
                for i in range(12)
            ]
            return [answer.choices[0].message.content or "" for answer in await asyncio.gather(*answers)]

    texts = asyncio.run(ask_all())
    assert all(texts[i] == texts[i % 3] for i in range(12))  # company doesn't matter


def test_a_common_prompt_is_cached(client):
    messages = [{"role": "system", "content": "all those words " * 20}, *HELLO]
    for _ in range(2):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 16
    assert answer.usage.prompt_tokens_details.cached_tokens < answer.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_n(client, stream):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "n": 3, "seed": 1}
    answer = client.chat.completions.create(**options, stream=stream)
    texts = ["", "", ""]
    if stream:
        for chunk in answer:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.completion_tokens <= 36
    again = client.chat.completions.create(**options)
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) > 1


def test_seed_and_temperature(client):
    def ask(**options):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=16, **options)
        return answer.choices[0].message.content

    assert ask(seed=3) == ask(seed=3)
    assert ask(seed=-1) == ask(seed=2**64 - 1)
    assert len({ask() for _ in range(4)}) > 1
    assert ask(temperature=0) == ask(temperature=0, seed=8) == ask(extra_body={"top_k": 1})


def test_logprobs_of_a_chat(client):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True})
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 8
    for entry in content:
        assert entry.logprob <= 0
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert math.isclose(entry.top_logprobs[0].logprob, entry.logprob, abs_tol=1e-5)
        assert sorted(entry.top_logprobs, key=lambda top: -top.logprob) == entry.top_logprobs
    chunks = client.chat.completions.create(
        **options, logprobs=True, top_logprobs=3, stream=True, extra_body={"ignore_eos": True}
    )
    streamed = [entry for chunk in chunks if (some := chunk.choices[0].logprobs) for entry in some.content]
    assert streamed == content
    plain = client.chat.completions.create(**options, logprobs=True)
    assert all(entry.top_logprobs == [] for entry in plain.choices[0].logprobs.content)


def test_stop(client):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content
    stop = text[len(text) // 2 :][:2]
    for given in (stop, ["never said", stop]):
        answer = client.chat.completions.create(**options, stop=given).choices[0]
        assert answer.message.content == text[: text.index(stop)]
        assert answer.finish_reason == "stop"
    chunks = client.chat.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[: text.index(stop)]


def test_penalties_and_bias(client):
    options = {"model": "tiny", "prompt": "the", "max_tokens": 6, "temperature": 0, "logprobs": 0}
    forced = client.completions.create(**options, logit_bias={"300": 100}).choices[0]
    assert len(set(forced.logprobs.tokens)) == 1
    varied = client.completions.create(**options, logit_bias={"300": 100}, frequency_penalty=2).choices[0]
    assert varied.logprobs.tokens == forced.logprobs.tokens  # 12 less of 100
    ends = client.completions.create(**options, logit_bias={"300": 100}, extra_body={"stop_token_ids": [300]})
    assert ends.choices[0].finish_reason == "stop"
    assert ends.choices[0].text == ""
    assert ends.usage.completion_tokens == 1


def test_json_schema(client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["fox", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=500, response_format=form, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    animal = json.loads(answer.choices[0].message.content)
    assert set(animal) == {"name", "legs"}
    assert animal["name"] in ("fox", "dog")
    assert animal["legs"] in range(10)


def test_json_object_and_regex(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=40, response_format={"type": "json_object"}
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")
    for extra, allowed in (
        ({"guided_regex": "(yes|no)!"}, {"yes!", "no!"}),
        ({"structured_outputs": {"choice": ["a b", "c.d", "e-f\ng"]}}, {"a b", "c.d", "e-f\ng"}),
    ):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=50, extra_body=extra)
        assert answer.choices[0].message.content in allowed
    spaced = client.completions.create(model="tiny", prompt="so: ", max_tokens=9, extra_body={"guided_regex": "yes"})
    assert spaced.choices[0].text == "yes"  # and no token healing
    text = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, response_format={"type": "text"}, temperature=0
    )
    assert text.choices[0].message.content


def test_parse_by_pydantic(client):
    """The client's own way to structured answers."""

    class Animal(pydantic.BaseModel):
        legs: int
        wild: bool

    answer = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Animal, max_tokens=300, extra_body={"top_k": 4}, seed=2,
        logit_bias={},
    )  # fmt: skip
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(answer.choices[0].message.parsed, Animal)


def test_completions(client):
    one = client.completions.create(model="tiny", prompt="the quick", max_tokens=5, temperature=0)
    assert one.object == "text_completion"
    assert one.usage.completion_tokens <= 5
    assert (
        client.completions.create(model="tiny", prompt="the", extra_body={"ignore_eos": True}).usage.completion_tokens
        == 16
    )
    two = client.completions.create(
        model="tiny", prompt=["the quick", "a lazy"], max_tokens=5, temperature=0, n=2, echo=True
    )
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == "the quick" + one.choices[0].text
    assert two.choices[3].text.startswith("a lazy")
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=["the quick", "a lazy"], max_tokens=5, temperature=0, echo=True, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [two.choices[0].text, two.choices[2].text]
    by_ids = client.completions.create(model="tiny", prompt=[256, 257, 258], max_tokens=3, echo=True, temperature=0)
    lists = client.completions.create(
        model="tiny", prompt=[[256, 257, 258], [259]], max_tokens=3, echo=True, temperature=0
    )
    assert by_ids.usage.prompt_tokens == 3
    assert lists.choices[0].text == by_ids.choices[0].text
    assert lists.usage.prompt_tokens == 4


def test_logprobs_of_completions(client):
    answer = client.completions.create(model="tiny", prompt="the quick", max_tokens=12, temperature=0, logprobs=2)
    table = answer.choices[0].logprobs
    count = answer.usage.completion_tokens
    assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset) == count
    assert table.text_offset[0] == 0
    assert table.text_offset == sorted(table.text_offset)
    for token, logprob, top in zip(table.tokens, table.token_logprobs, table.top_logprobs, strict=True):
        assert math.isclose(top[token], logprob, abs_tol=1e-5)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"


def test_errors(client):
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as error:
        create(model="gpt-4o", messages=HELLO)
    assert error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", messages=HELLO, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", messages=[{"role": "user", "content": "word " * 3000}])
    assert error.value.code == "context_length_exceeded"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", messages=HELLO, tools=[tool])
    assert error.value.param == "tools"


def test_damaged_logits(client):
    """A request that the model has no finite answer to; the server answers others."""
    with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="tiny", prompt=POISON)
    assert "not finite" in error.value.message
    with pytest.raises(openai.InternalServerError):
        list(client.completions.create(model="tiny", prompt=POISON, stream=True))
    test_chat(client)


def test_an_error_in_mid_stream(client, tiny_model):
    """What was streamed stands, and the client is told."""
    poison = Tokenizer.load(tiny_model / "tokenizer.json").encode(POISON)[-1]
    chunks = client.completions.create(model="tiny", prompt="the", stream=True, logit_bias={str(poison): 100})
    assert next(chunks).choices[0].finish_reason is None
    with pytest.raises(openai.APIError, match="not finite"):
        next(chunks)


def test_a_client_that_leaves_frees_its_pages(server: Running, client):
    server.wait_for("fastllm_pages_used", 0)
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**options, stream=True)
    next(iter(stream))
    assert server.metric("fastllm_requests_running") == 1
    assert server.metric("fastllm_pages_used") > 90
    stream.close()
    server.wait_for("fastllm_pages_used", 0)
    assert server.metric("fastllm_requests_running") == 0
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(**options)
    server.wait_for("fastllm_pages_used", 0)
    assert server.metric("fastllm_generated_tokens_total") < 2900


def test_metrics(server: Running, client):
    before = server.metric("fastllm_generated_tokens_total")
    name = 'fastllm_requests_total{endpoint="/v1/chat/completions",status="200"}'
    test_chat(client)
    answered = server.metric(name)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=7)
    server.wait_for(name, answered + 1)
    assert server.metric("fastllm_generated_tokens_total") >= before + answer.usage.completion_tokens
    for histogram in ("time_to_first_token", "time_between_tokens", "request", "queue"):
        assert server.metric(f"fastllm_{histogram}_seconds_count") > 0
    assert server.metric("fastllm_pages") > 0
    assert server.metric("process_resident_memory_bytes") > 0
