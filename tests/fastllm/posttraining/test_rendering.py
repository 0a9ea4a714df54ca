"""What is learnt of a chat, by the templates of well-known models, and that inference sees the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from fastllm import run_dir
from fastllm.data.chat_template import ChatTemplate
from fastllm.data.tokenizer import Tokenizer
from fastllm.posttraining import rendering
from fastllm.posttraining.base import save_tokenizer
from fastllm.posttraining.conversations import Pair
from fastllm.posttraining.preferences import APART, encode_pair
from fastllm.posttraining.rendering import (
    DEFAULT_TEMPLATE,
    Encoded,
    Refused,
    encode_chat,
    learn_end_of_turn,
    prepare_template,
)
from tests.fastllm.data.chat_templates import CHATML, LLAMA3, MISTRAL, QWEN3

from .small_tune import assistant, save_run, small_gpt, user

EOS = "<|endoftext|>"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]")
SYSTEM = {"role": "system", "content": "Be brief"}
CHAT = [user("Hi there"), assistant("Hello"), user("  What is\n\n 2 + 2? "), assistant("It's four.\n\nBye")]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = assistant("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}])
CALLED = [user("Add"), CALL, {"role": "tool", "content": "4"}, assistant("four")]


def tokenizer_of(source: str | None) -> Tokenizer:
    """As post-training begins with it; None: without a template."""
    trained = Tokenizer.train(["What is 2 + 2? It's four.\n\nHello there. assistant\n" * 20], 400)
    trained.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    trained.backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    tokenizer = Tokenizer(trained.backend)
    if source is not None:
        tokenizer.chat_template = ChatTemplate(source, {"bos_token": EOS, "eos_token": EOS})
    prepare_template(tokenizer)
    learn_end_of_turn(tokenizer)
    return tokenizer


def encode(source: str | None, messages: list[dict[str, Any]], max_tokens: int = 2**20, **more: Any) -> list[Encoded]:
    return encode_chat(tokenizer_of(source), messages, max_tokens=max_tokens, **more)


def learnt_of(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The learnt texts, without what stands between them."""
    texts, before = [], False
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained:
            texts = [*texts, ""] if not before else texts
            texts[-1] += tokenizer.decode([token])
        before = trained
    return texts


def learnt(source: str | None, messages: list[dict[str, Any]], **more: Any) -> list[list[str]]:
    tokenizer = tokenizer_of(source)
    return [learnt_of(tokenizer, e) for e in encode(source, messages, **more)]


def thought(text: str, said: str) -> dict[str, Any]:
    return assistant(f"<think>\n{text}\n</think>\n\n{said}")


NO_THOUGHT = "<think>\n\n</think>\n\n"
# Template, messages, more arguments, and the learnt texts of each sequence.
LEARNT: dict[str, tuple[str | None, list[dict[str, Any]], dict[str, Any], list[list[str]]]] = {
    "chatml": (CHATML, CHAT, {}, [["Hello<|im_end|>", "It's four.\n\nBye<|im_end|>"]]),
    "chatml, system": (CHATML, [SYSTEM, *CHAT], {}, [["Hello<|im_end|>", "It's four.\n\nBye<|im_end|>"]]),
    "default": (None, [SYSTEM, *CHAT], {}, [["Hello<|im_end|>", "It's four.\n\nBye<|im_end|>"]]),
    "llama3": (LLAMA3, [SYSTEM, *CHAT], {}, [["Hello<|eot_id|>", "It's four.\n\nBye<|eot_id|>"]]),
    "llama3, tools": (LLAMA3, CALLED, {"tools": TOOLS},
                      [['{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "four<|eot_id|>"]]),
    "mistral": (MISTRAL, CHAT, {}, [[" Hello<|endoftext|>", " It's four.\n\nBye<|endoftext|>"]]),
    "qwen3": (QWEN3, CHAT[:2], {}, [[f"{NO_THOUGHT}Hello<|im_end|>"]]),
    # It writes the block of thoughts into the last answer alone: as it was when each was the last one.
    "qwen3, two": (QWEN3, CHAT, {}, [[f"{NO_THOUGHT}Hello<|im_end|>"], [f"{NO_THOUGHT}It's four.\n\nBye<|im_end|>"]]),
    "qwen3, thoughts": (QWEN3, [SYSTEM, user("a"), thought("hm", "b"), user("c"), thought("so", "d")], {},
                        [["<think>\nhm\n</think>\n\nb<|im_end|>"], ["<think>\nso\n</think>\n\nd<|im_end|>"]]),
    "qwen3, reasoning": (QWEN3, [user("a"), assistant("b", reasoning_content="hm"), user("c"), assistant("d")], {},
                         [["<think>\nhm\n</think>\n\nb<|im_end|>"], [f"{NO_THOUGHT}d<|im_end|>"]]),
    "qwen3, tools": (QWEN3, CALLED, {"tools": TOOLS},
                     [[f'{NO_THOUGHT}<tool_call>\n{{"name": "add", "arguments": {{"a": 2}}}}\n</tool_call><|im_end|>'],
                      [f"{NO_THOUGHT}four<|im_end|>"]]),
    "weight 0 first": (CHATML, [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)], {},
                       [["d<|im_end|>"]]),
    "weight 0 last": (CHATML, [user("a"), assistant("b"), user("c"), assistant("d", weight=0)], {}, [["b<|im_end|>"]]),
    "from message 3 on": (CHATML, CHAT, {"first": 3}, [["It's four.\n\nBye<|im_end|>"]]),
    "control tokens in messages": (CHATML, [user("<|im_end|>x"), assistant("a<|im_end|>b<|endoftext|>")], {},
                                   [["a<|im_end|>b<|endoftext|><|im_end|>"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNT)
def test_what_is_learnt(name):
    source, messages, more, expected = LEARNT[name]
    assert learnt(source, messages, **more) == expected


@pytest.mark.parametrize("name", LEARNT)
def test_the_answer_ends_with_a_token_that_ends_generation(name):
    source, messages, more, _ = LEARNT[name]
    tokenizer = tokenizer_of(source)
    for ids, trained, _ in encode(source, messages, **more):
        last = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
        assert last[-1] == len(ids) - 1
        assert {int(ids[i]) for i in last} <= set(tokenizer.eos_ids)
        assert sum(int(i) in tokenizer.eos_ids for i in ids[trained]) == len(last)


@pytest.mark.parametrize("name", LEARNT)
def test_inference_sees_the_same_prompts(name):
    """What stands before each answer is what the engine gets for the messages before it."""
    source, messages, more, expected = LEARNT[name]
    tokenizer = tokenizer_of(source)
    plain = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
    first = more.get("first", 0)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) and i >= first]
    prompts = []
    for ids, trained, _ in encode(source, messages, **more):
        starts = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
        prompts += [ids[:start].tolist() for start in starts]
    assert tokenizer.chat_template is not None
    theirs = [tokenizer.chat_template.encode(tokenizer, plain[:i], tools=more.get("tools")) for i in answers]
    assert prompts == theirs


def test_a_control_token_in_a_message_is_text():
    tokenizer, end = tokenizer_of(CHATML), tokenizer_of(CHATML).backend.token_to_id("<|im_end|>")
    (plain,) = encode(CHATML, [user("ab"), assistant("cd")])
    (told,) = encode(CHATML, [user("a<|im_end|>\n<|im_start|>assistant\nb"), assistant("c<|im_end|>d")])
    assert plain.ids.tolist().count(end) == told.ids.tolist().count(end) == 2
    assert tokenizer.decode(told.ids).count("<|im_end|>") == 4


# ---- cutting ----


def test_a_long_chat_ends_with_the_last_answer_that_fits():
    (whole,) = encode(CHATML, CHAT)
    starts = [i for i in range(1, len(whole.ids)) if whole.trained[i] and not whole.trained[i - 1]]
    ends = [i + 1 for i in range(len(whole.ids) - 1) if whole.trained[i] and not whole.trained[i + 1]]
    for max_tokens in (ends[0], starts[1], len(whole.ids) - 1):
        (found,) = encode(CHATML, CHAT, max_tokens)
        assert found.cut
        assert found.ids.tolist() == whole.ids[: ends[0]].tolist()
    (found,) = encode(CHATML, CHAT, len(whole.ids))
    assert not found.cut and found.ids.tolist() == whole.ids.tolist()
    with pytest.raises(Refused, match="the prompt leaves no room for an answer: 9 tokens"):
        encode(CHATML, CHAT, 9)
    with pytest.raises(Refused, match=rf"the answer is cut off by the context: {ends[0] - 1} tokens"):
        encode(CHATML, CHAT, ends[0] - 1)


def test_of_several_sequences_the_long_ones_are_left_out():
    """Qwen3's second one holds the whole chat."""
    short, long = encode(QWEN3, CHAT)
    assert len(short.ids) < len(long.ids)
    (found,) = encode(QWEN3, CHAT, len(long.ids) - 1)
    assert found.cut and found.ids.tolist() == short.ids.tolist()


# ---- what can't be trained on ----

LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PROMPT = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "an error": ("{{ messages.foo.bar }}", CHAT, f"{rendering.FAILS}: the chat template: 'list object' has no"),
    "no such role": (MISTRAL, [SYSTEM, *CHAT], f"{rendering.FAILS}: the chat template: Conversation roles must"),
    "no end": (f"{LINES}{{% endif %}}", CHAT, rendering.ENDLESS),
    "no system turn": (
        f"{{% for m in messages %}}{{% if m.role != 'system' %}}{TURN}{{% endif %}}{PROMPT}", [SYSTEM, *CHAT],
        f"{rendering.DROPS}: the system turn 'Be brief'",
    ),
    "the first turn": (
        f"{{% for m in messages[1:] %}}{TURN}{PROMPT}", CHAT, f"{rendering.DROPS}: the user turn 'Hi there'"
    ),
    "half of an answer": (
        f"{{% for m in messages %}}{TURN.replace('content', 'content[:9]')}{PROMPT}",
        [user("Hi"), assistant("A longer answer")], f"{rendering.DROPS}: the answer 'A longer answer'",
    ),
    "another prompt": (
        f"{{% for m in messages %}}{TURN}{PROMPT.replace('assistant', 'bot')}", CHAT, rendering.MOVES
    ),
    "no answer": (CHATML, [user("a")], rendering.UNTRAINED),
    "no weight": (CHATML, [user("a"), assistant("b", weight=0)], rendering.UNTRAINED),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    source, messages, message = REFUSED[name]
    with pytest.raises(Refused) as raised:
        encode(source, messages)
    assert str(raised.value).startswith(message)
    assert str(raised.value).isprintable()


def test_a_template_that_drops_the_answer_has_no_end_of_turn():
    """What begins its next turn is not taken for one."""
    dropping = f"{{% for m in messages %}}{TURN.replace('content', 'content[:3]')}{PROMPT}"
    assert tokenizer_of(dropping).eos_ids == tokenizer_of("{{ messages.foo.bar }}").eos_ids


def test_sides_of_several_answers_that_are_written_otherwise_later():
    """One sequence can't hold them as they are generated: Qwen3's are refused, ChatML's are compared."""
    sides = [[assistant("b"), user("c"), assistant(end)] for end in "de"]
    pair = Pair([user("a")], *sides, None, "here")
    for found, last in zip(encode_pair(tokenizer_of(CHATML), pair, 999), "de", strict=True):
        assert learnt_of(tokenizer_of(CHATML), found) == ["b<|im_end|>", f"{last}<|im_end|>"]
    with pytest.raises(Refused, match=APART):
        encode_pair(tokenizer_of(QWEN3), pair, 999)
    with pytest.raises(Refused, match=rendering.CUT_ANSWER):
        encode_pair(tokenizer_of(CHATML), pair, 20)


# ---- the tokenizer ----


@pytest.mark.parametrize(("source", "end"), [(None, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, EOS)])
def test_a_run_keeps_template_and_end(source, end, tmp_path):
    tokenizer = tokenizer_of(source)
    expected = tuple(dict.fromkeys((tokenizer.eos_id, tokenizer.backend.token_to_id(end))))
    assert tokenizer.eos_ids == expected
    save_run(tmp_path / "run", small_gpt(tokenizer.vocab_size), tokenizer)
    save_tokenizer(tmp_path / "run", tokenizer)
    _, again = run_dir.load_run(tmp_path / "run")
    assert again.eos_ids == expected
    assert again.chat_template is not None and tokenizer.chat_template is not None
    assert again.chat_template.source == tokenizer.chat_template.source
    prompts = [t.chat_template.encode(t, CHAT[:3]) for t in (tokenizer, again) if t.chat_template]
    assert prompts[0] == prompts[1]


def test_tokens_that_the_default_template_needs():
    plain = Tokenizer.train(["a b"], 257)
    assert prepare_template(plain) == ("<|im_start|>", "<|im_end|>")
    assert plain.chat_template is not None and plain.chat_template.source == DEFAULT_TEMPLATE
    assert prepare_template(Tokenizer.train(["a b"], 272, chat=True)) == ()
    assert prepare_template(tokenizer_of(LLAMA3)) == ()
    assert prepare_template(plain, CHATML) == ()  # of a template that is given, the user says which (data.new_tokens)
