"""What the bodies of /v1/chat/completions and /v1/completions ask for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...data.tokenizer import Tokenizer
from ...errors import ParameterError, UserError
from ...input_files import shown
from ..prompts import chat_prompt, text_prompt
from ..request import Prompt
from ..sampling import SamplingParams
from ..structured import JSON_OBJECT, Grammar, json_schema, regex
from .errors import ApiError
from .fields import Fields

MOST_ANSWERS = 128  # to one body: n times its prompts
MOST_STOPS = 16
MOST_LOGPROBS = 20
MOST_BIASES = 1024
COMPLETION_TOKENS = 16  # of /v1/completions where max_tokens is absent, as at OpenAI

# Fields that change nothing in the answer.
IGNORED = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
)  # fmt: skip
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Generation:
    """A body, checked."""

    chat: bool
    prompts: list[Prompt]
    params: SamplingParams
    stream: bool
    include_usage: bool
    logprobs: bool
    echoes: list[str] | None  # the texts of the prompts, where the answers begin with them

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.params.n


@dataclass(frozen=True)
class Model:
    """What bodies are checked against."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    longest_token: int  # bytes

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"there is no model {shown(name)}, this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_text(self, text: str, param: str) -> None:
        """Refuse a text that is too long by far before it is encoded."""
        if len(text) > self.max_seq_len * self.longest_token:
            raise self._too_long(f"{len(text):,} characters", param)

    def check_prompt(self, prompt: Prompt, param: str) -> Prompt:
        if len(prompt.tokens) >= self.max_seq_len:
            raise self._too_long(f"{len(prompt.tokens):,} tokens", param)
        return prompt

    def _too_long(self, size: str, param: str) -> ApiError:
        message = f"the prompt has {size}, the model sees {self.max_seq_len:,} tokens with the answer"
        return ApiError(400, message, param=param, code="context_length_exceeded")


def chat_generation(body: dict[str, Any], model: Model) -> Generation:
    """The body of /v1/chat/completions. ParameterError or ApiError names what is wrong."""
    fields = Fields(body)
    model.check_name(fields.text("model"))
    messages = _messages(fields, model)
    most = 2**31 - 1
    max_tokens = fields.whole("max_completion_tokens", least=1, most=most)
    max_tokens = max_tokens or fields.whole("max_tokens", least=1, most=most)
    logprobs = fields.flag("logprobs")
    top = fields.whole("top_logprobs", least=0, most=MOST_LOGPROBS)
    if top and not logprobs:
        raise ParameterError("top_logprobs", "top_logprobs needs logprobs to be true")
    for name in ("tools", "functions", "audio", "web_search_options", "reasoning_effort", "verbosity"):
        fields.refuse(name)
    fields.refuse("tool_choice", "none", "auto")
    fields.refuse("function_call", "none", "auto")
    fields.refuse("modalities", ["text"])
    options = {**_options(fields), "max_tokens": max_tokens, "logprobs": top}
    stream, include_usage = _stream(fields)
    fields.end()
    params = SamplingParams(**options)
    _check_answers(params.n, "n")
    try:
        prompt = chat_prompt(model.tokenizer, messages)
    except ParameterError:
        raise
    except UserError as error:
        raise ParameterError("messages", str(error)) from None
    prompts = [model.check_prompt(prompt, "messages")]
    return Generation(True, prompts, params, stream, include_usage, logprobs, None)


def completion_generation(body: dict[str, Any], model: Model) -> Generation:
    """The body of /v1/completions. ParameterError or ApiError names what is wrong."""
    fields = Fields(body)
    model.check_name(fields.text("model"))
    given = fields.take("prompt")
    max_tokens = fields.whole("max_tokens", COMPLETION_TOKENS, least=1, most=2**31 - 1)
    logprobs = fields.whole("logprobs", least=0, most=MOST_LOGPROBS)
    echo = fields.flag("echo")
    if echo and logprobs is not None:
        raise ParameterError("echo", "echo with logprobs is not supported")
    fields.refuse("suffix", "")
    best_of = fields.take("best_of")
    options = {**_options(fields), "max_tokens": max_tokens, "logprobs": logprobs}
    if best_of is not None and best_of != options.get("n", 1):
        raise ParameterError("best_of", "best_of other than n is not supported")
    stream, include_usage = _stream(fields)
    fields.end()
    params = SamplingParams(**options)
    texts = _prompts(given)
    _check_answers(params.n * len(texts), "n" if len(texts) == 1 else "prompt")
    prompts, echoes = [], []
    for text in texts:
        if isinstance(text, str):
            model.check_text(text, "prompt")
            try:
                own = text_prompt(model.tokenizer, text, heal=params.grammar is None)
                prompts.append(model.check_prompt(own, "prompt"))
            except UserError as error:
                raise ParameterError("prompt", str(error)) from None
        else:
            outside = next((token for token in text if not 0 <= token < model.vocab_size), None)
            if outside is not None:
                raise ParameterError(
                    "prompt", f"prompt has token {shown(outside)}, the model's are 0 to {model.vocab_size - 1}"
                )
            prompts.append(model.check_prompt(Prompt(text), "prompt"))
        if echo:
            echoes.append(text if isinstance(text, str) else model.tokenizer.decode(text))
    return Generation(False, prompts, params, stream, include_usage, logprobs is not None, echoes if echo else None)


def _check_answers(count: int, param: str) -> None:
    if count > MOST_ANSWERS:
        raise ParameterError(param, f"a request has at most {MOST_ANSWERS} answers (n for each prompt), not {count:,}")


def _prompts(given: Any) -> list[str | list[int]]:
    """Texts or token ids, of which there may be one or a list."""
    match given:
        case str():
            return [given]
        case [int(), *_]:
            given = [given]
    rule = "a text, a list of texts, a list of token ids or a list of such lists, none of them empty"
    if not isinstance(given, list) or not given:
        raise ParameterError("prompt", f"prompt must be {rule}")
    for prompt in given:
        tokens = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        if not (isinstance(prompt, str) or tokens):
            raise ParameterError("prompt", f"prompt must be {rule}")
    return given


def _messages(fields: Fields, model: Model) -> list[dict[str, str]]:
    given = fields.items("messages")
    if not given:
        raise ParameterError("messages", "messages must be a list of at least one message")
    messages = []
    for i, message in enumerate(given):
        if not isinstance(message, dict):
            raise ParameterError("messages", f"messages[{i}] must be an object with role and content")
        parts = Fields(message, f"messages[{i}].")
        role = parts.text("role")
        if role not in ROLES:
            raise parts.wrong("role", f"system, developer, user or assistant, it is {shown(role)}")
        content = _content(parts)
        parts.ignore(("name", "annotations"))
        for name in ("refusal", "audio", "tool_calls", "function_call", "tool_call_id"):
            parts.refuse(name)
        parts.end()
        messages.append({"role": ROLES[role], "content": content})
    model.check_text("".join(message["content"] for message in messages), "messages")
    return messages


def _content(message: Fields) -> str:
    """A text, or a list of parts that are texts."""
    content = message.take("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise message.wrong("content", "a text or a list of parts with type and text")
    texts = []
    for i, part in enumerate(content):
        where = f"{message.where}content[{i}]"
        if not isinstance(part, dict):
            raise ParameterError(where, f"{where} must be an object with type and text")
        kind, text = part.get("type"), part.get("text")
        if kind != "text":
            raise ParameterError(f"{where}.type", f"{where}.type must be text, {shown(kind)} is not supported")
        if not isinstance(text, str):
            raise ParameterError(f"{where}.text", f"{where}.text must be a text")
        texts.append(text)
    return "".join(texts)


def _stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and to end the stream with the usage."""
    stream = fields.flag("stream")
    options = fields.table("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise ParameterError("stream_options", "stream_options needs stream to be true")
    include_usage = options.flag("include_usage")
    options.ignore(("include_obfuscation",))
    options.end()
    return stream, include_usage


# Fields that SamplingParams has by the same name and checks itself.
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "n",
    "ignore_eos",
)  # fmt: skip


def _options(fields: Fields) -> dict[str, Any]:
    """What both bodies say of sampling, as the fields of SamplingParams."""
    options = {name: value for name in _SAME if (value := fields.take(name)) is not None}
    if options.get("top_k") == -1:  # vLLM's word for all
        options["top_k"] = 0
    if not isinstance(options.get("ignore_eos", False), bool):
        raise fields.wrong("ignore_eos", "true or false")
    seed = fields.whole("seed", least=-(2**63), most=2**64 - 1)
    if seed is not None:
        options["seed"] = seed % 2**64
    stop = fields.take("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise fields.wrong("stop", f"a text or a list of at most {MOST_STOPS}, none of them empty")
    stop_ids = fields.items("stop_token_ids") or []
    if len(stop_ids) > MOST_BIASES or not all(type(token) is int for token in stop_ids):
        raise fields.wrong("stop_token_ids", f"a list of at most {MOST_BIASES:,} token ids")
    fields.ignore(IGNORED)
    bias = fields.table("logit_bias")
    return {
        **options, "stop": tuple(stop), "stop_token_ids": tuple(stop_ids),
        "logit_bias": {} if bias is None else _bias(fields, bias), "grammar": _grammar(fields),
    }  # fmt: skip


def _bias(fields: Fields, bias: Fields) -> dict[int, float]:
    rule = f"an object of at most {MOST_BIASES:,} token ids, each with a number from -100 to 100"
    read = {}
    given = bias.rest()
    if len(given) > MOST_BIASES:
        raise fields.wrong("logit_bias", rule)
    for token, value in given.items():
        if not re.fullmatch(r"[0-9]{1,9}", token) or type(value) not in (int, float) or not -100 <= value <= 100:
            raise fields.wrong("logit_bias", rule)
        read[int(token)] = value
    return read


def _grammar(fields: Fields) -> Grammar | None:
    """The form of the answer: response_format, or vLLM's structured_outputs, guided_json and guided_regex."""
    found: dict[str, Callable[[], Grammar]] = {}
    response_format = fields.table("response_format")
    if response_format is not None and (make := _response_format(response_format)):
        found["response_format"] = make
    inner = fields.table("structured_outputs") or Fields({}, "structured_outputs.")
    for table, prefix in ((inner, ""), (fields, "guided_")):
        schema = table.take(f"{prefix}json")
        if schema is not None:
            found[f"{table.where}{prefix}json"] = _schema(table, f"{prefix}json", schema)
        pattern = table.text(f"{prefix}regex")
        if pattern is not None:
            found[f"{table.where}{prefix}regex"] = partial(regex, pattern)
        choices = table.items(f"{prefix}choice")
        if choices is not None:
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                raise table.wrong(f"{prefix}choice", "a list of texts, none of them empty")
            found[f"{table.where}{prefix}choice"] = partial(regex, "|".join(map(re.escape, choices)))
    inner.end()
    if len(found) > 1:
        first, second, *_ = found
        raise ParameterError(second, f"{first} and {second} exclude one another")
    for name, make in found.items():
        try:
            return make()
        except ParameterError as error:
            raise ParameterError(name, f"{name}: {error}") from None
    return None


def _response_format(table: Fields) -> Callable[[], Grammar] | None:
    kind = table.text("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise table.wrong("type", f"text, json_object or json_schema, it is {shown(kind)}")
    inner = table.table("json_schema")
    table.end()
    if kind == "text":
        return None
    if kind == "json_object":
        return partial(json_schema, JSON_OBJECT)
    if inner is None:
        raise table.wrong("json_schema", "an object with a schema")
    schema = inner.take("schema")
    inner.ignore(("name", "strict", "description"))
    inner.end()
    return _schema(inner, "schema", schema)


def _schema(table: Fields, name: str, schema: Any) -> Callable[[], Grammar]:
    if not isinstance(schema, Mapping | bool):
        raise table.wrong(name, "a JSON schema")
    return partial(json_schema, schema)
