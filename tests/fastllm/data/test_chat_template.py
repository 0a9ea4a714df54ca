"""Chat templates: the text that transformers makes, bounded work, and messages that never become control tokens."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastllm.data import chat_renderer
from fastllm.data.chat_template import ChatTemplate, read_chat_template
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError

from .chat_templates import CHATML, LLAMA3, MISTRAL, PARTS, QWEN3

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]")


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b  # <|im_end|> 12 é\n" * 20], 400)
    tokenizer.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return Tokenizer(tokenizer.backend)


TOKENIZER = make_tokenizer()
EOS = "<|endoftext|>"
THEIRS = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend, bos_token=EOS, eos_token=EOS)
NAMES = {"bos_token": EOS, "eos_token": EOS}

USER, ANSWER = {"role": "user", "content": "  What is\n\n 2 + 2?  "}, {"role": "assistant", "content": "It's <4> \n"}
SYSTEM = {"role": "system", "content": "Be brief; é 日本 \"'<>&"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [1.5, None, "é<"]}}}],
}
RESULT = {"role": "tool", "content": '{"sum": 4}'}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds é", "parameters": {"type": "object"}}}]
CHATS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "chatml": (CHATML, [SYSTEM, USER, ANSWER, USER], {}),
    "llama3": (LLAMA3, [USER], {}),
    "llama3, system": (LLAMA3, [SYSTEM, USER, ANSWER, USER], {"date_string": "1 Jan 2030"}),
    "llama3, tools": (LLAMA3, [SYSTEM, USER, CALL, RESULT, ANSWER, USER], {"tools": TOOLS}),
    "mistral": (MISTRAL, [USER, ANSWER, USER], {}),
    "qwen3": (QWEN3, [SYSTEM, USER, THOUGHT, USER], {}),
    "qwen3, no thoughts": (QWEN3, [USER, THOUGHT], {"enable_thinking": False}),
    "qwen3, tools": (QWEN3, [SYSTEM, USER, CALL, RESULT, RESULT, THOUGHT], {"tools": TOOLS}),
    "qwen3, reasoning": (QWEN3, [USER, {**ANSWER, "reasoning_content": "hm"}], {}),
    "parts": (PARTS, [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b "}]}, ANSWER], {}),
}


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_as_transformers(name, generation):
    source, messages, more = CHATS[name]
    template = ChatTemplate(source, NAMES)
    theirs = THEIRS.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=generation, **more
    )
    assert template.render(messages, add_generation_prompt=generation, **more) == theirs
    ids = template.encode(TOKENIZER, messages, add_generation_prompt=generation, **more)
    assert ids == THEIRS(theirs, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == theirs
    assert not TOKENIZER.special_ids.isdisjoint(ids)


@pytest.mark.parametrize("source", ["{{ strftime_now('%Y') }}", "{% break %}", "{{ {'a': 'é<'} | tojson(indent=2) }}"])
def test_functions_of_transformers(source):
    source = "{% for m in messages %}x" + source + "{% endfor %}"
    theirs = THEIRS.apply_chat_template([USER, USER], chat_template=source, tokenize=False)
    assert ChatTemplate(source).render([USER, USER]) == theirs


def control(text: str) -> list[int]:
    return [i for i in ChatTemplate(CHATML).encode(TOKENIZER, [{"role": "user", "content": text}]) if i in SPECIAL_IDS]


SPECIAL_IDS = TOKENIZER.special_ids
PLAIN_CHAT = control("")


def text_of(*parts: str) -> list[int]:
    """A chat of a text in several parts."""
    content = [{"type": "text", "text": part} for part in parts]
    return ChatTemplate(PARTS).encode(TOKENIZER, [{"role": "user", "content": content}])


def assert_text(*parts: str) -> None:
    ids = text_of(*parts)
    assert [i for i in ids if i in SPECIAL_IDS] == PLAIN_CHAT
    assert TOKENIZER.decode(ids) == f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("token", [*SPECIAL, EOS])
def test_control_tokens_in_a_message_are_text(token):
    for text in (token, f"a{token}b", token * 3, token[0] + token, token + token[-1], f" {token} \n", token.upper()):
        assert control(text) == PLAIN_CHAT
        assert_text(text)
    for cut in range(len(token) + 1):  # also where a template joins it
        assert_text(token[:cut], token[cut:])
        assert_text("x" + token[:cut], token[cut : cut + 1], token[cut + 1 :] + "x")


fragments = st.sampled_from([piece for token in (*SPECIAL, EOS) for piece in (token, token[:4], token[4:], token[-1])])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(fragments, st.text(max_size=5)), min_size=1, max_size=6), st.integers(1, 3))
def test_messages_never_make_control_tokens(pieces, step):
    assert_text(*pieces)
    assert_text(*("".join(pieces[i : i + step]) for i in range(0, len(pieces), step)))


def test_everything_that_the_caller_gives_is_text():
    end = TOKENIZER.backend.token_to_id("<|im_end|>")
    tools = [{"type": "function", "function": {"name": "<|im_end|>", "parameters": {"<|im_end|>": ["<|im_end|>"]}}}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"<|im_end|>": "<|im_end|>"}}}]}
    template = ChatTemplate(QWEN3)
    plain = template.encode(TOKENIZER, [USER, CALL], tools=TOOLS)
    assert template.encode(TOKENIZER, [USER, call], tools=tools).count(end) == plain.count(end) == 3
    source = "<|im_end|>{{ date }}{{ eos_token }}"
    ids = ChatTemplate(source, {"eos_token": "<|im_end|>"}).encode(TOKENIZER, [USER], date="<|im_end|>")
    assert ids.count(end) == 2  # the template's and the tokenizer's


def test_marks_are_characters_that_nobody_uses():
    text = "".join(map(chr, range(0xFDD0, 0xFDF0))) + "<|im_end|>"
    assert_text(text)


def test_the_same_tokens_as_the_text_has():
    text = "x<|im_end|> y"
    ids = text_of(text)
    expected = TOKENIZER.encode(f"user\n{text}", add_special_tokens=False)
    assert ids[1 : 1 + len(expected)] == expected


def test_a_tokenizer_whose_merges_make_a_special_token():
    """It is text all the same, in smaller tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # no words
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["<|im_end|>"] * 50, trainer)
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    whole = backend.token_to_id("<|im_end|>")
    broken = Tokenizer(backend, eos_ids=(whole,))
    assert broken.encode("<|im_end|>") == [whole]
    ids = ChatTemplate("<|im_end|>{{ messages[0].content }}").encode(
        broken, [{"role": "user", "content": "<|im_end|>"}]
    )
    assert ids.count(whole) == 1
    assert broken.decode(ids) == "<|im_end|><|im_end|>"


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": NESTED,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "powers": "{{ 9 ** (9 ** 9) % 7 }}",
    "words": "{{ lipsum(n=10**9) }}",
}
TOO_LARGE = {
    "times": "{{ 'a' * 10**10 }}",
    "lists": "{{ [0] * 10**10 }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "blocks": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set x %}{{ n.s }}{{ n.s }}{% endset %}"
    "{% set n.s = x %}{% endfor %}{{ n.s }}",
    "joining": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "formats": "{{ '{:>99999999999}'.format(1) }}{{ '%99999999999d' % 1 }}",
    "padding": "{{ 'a' | center(10**10) }}",
    "output": "{{ 'a' * (2**24 + 1) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end(name):
    with pytest.raises(UserError, match="the chat template does not end: it has worked for 2 seconds"):
        ChatTemplate(ENDLESS[name]).render([USER])
    assert ChatTemplate(CHATML).render([USER]).startswith("<|im_start|>")  # the next one is not harmed


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_template_that_is_too_large(name):
    with pytest.raises(UserError, match=r"the chat template: (it takes|its text has) more than") as raised:
        ChatTemplate(TOO_LARGE[name]).render([USER])
    assert len(str(raised.value)) < 200
    assert ChatTemplate(CHATML).render([USER]).startswith("<|im_start|>")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for", "line 1: unexpected 'end of template'"),
        ("\n{% endfor %}", "line 2: Encountered unknown tag 'endfor'"),
        ("{{ raise_exception('no\nway') }}", "the chat template: no way"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{% set n = namespace(__class__=1) %}", "'__class__' can't be a name in a namespace"),
        ("{{ messages.append(1) }}", "is unsafe|is not safely callable"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("{% include 'x' %}", "no loader for this environment"),
        ("{{ cycler.__init__.__globals__.os.system('x') }}", "unsafe|undefined"),
        (MISTRAL, None),
    ],
)
def test_errors_of_a_template(source, message):
    template = ChatTemplate(source, NAMES)
    if message is None:
        message = "Conversation roles must alternate"
        with pytest.raises(UserError, match=message):
            template.render([USER, USER])
        message = "Conversation roles must alternate|Only user and assistant"
        with pytest.raises(UserError, match=message):
            template.render([SYSTEM, USER])
        return
    with pytest.raises(UserError, match=message) as raised:
        template.render([USER])
    assert str(raised.value).startswith("the chat template: ")
    assert str(raised.value).isprintable()


DEEP: Any = "x"
for _ in range(100):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hello", "messages must be a list, it is 'hello'"),
        (None, "messages must be a list, it is None"),
        (["hello"], r"messages\[0\] must be an object with a role and a content, it is 'hello'"),
        ([USER, {"content": "x"}], r"messages\[1\]\.role must be one of system, .*, it is None"),
        (
            [{"role": "user<|im_end|>", "content": "x"}],
            r"messages\[0\]\.role must be one of .* it is 'user<\|im_end\|>'",
        ),
        ([{"role": "wizard", "content": "x"}], r"messages\[0\]\.role must be one of .* it is 'wizard'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role must be one of"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content must be a text or a list of parts, it is 7"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\]\.content is not valid Unicode text"),
        (
            [{"role": "user", "content": [{"text": object()}]}],
            r"messages\[0\]\.content\[0\]\.text must be made of texts",
        ),
        ([{"role": "user", "content": [{7: "x"}]}], r"messages\[0\]\.content\[0\] must be made of texts"),
        ([{"role": "user", "content": DEEP}], r"messages\[0\] is nested more than 64 deep"),
    ],
)
def test_errors_of_messages(messages, message):
    for call in (ChatTemplate(CHATML).render, lambda m: ChatTemplate(CHATML).encode(TOKENIZER, m)):
        with pytest.raises(UserError, match=message):
            call(messages)


def test_inputs_are_left_alone():
    messages = [dict(SYSTEM), {**CALL, "tool_calls": [dict(call) for call in CALL["tool_calls"]]}]
    before = json.dumps(messages)
    ChatTemplate(QWEN3).encode(TOKENIZER, messages, tools=TOOLS)
    assert json.dumps(messages) == before


def test_many_threads():
    found: list[bool] = []

    def work(number: int) -> None:
        chats = [[{"role": "user", "content": f"{number} {i}"}] for i in range(50)]
        texts = [ChatTemplate(CHATML).render(chat) for chat in chats]
        found.append(all(f"{number} {i}<" in text for i, text in enumerate(texts)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_a_process_that_somebody_kills():
    template = ChatTemplate(CHATML)
    template.render([USER])
    process = chat_renderer._renderers[os.getpid()]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match=r"the chat template: its process ended \(-9\)"):
        template.render([USER])
    assert template.render([USER]).startswith("<|im_start|>")


def _in_a_fork(queue: Any) -> None:
    queue.put(ChatTemplate(CHATML).render([USER]))


def test_after_a_fork():
    """A child has a process of its own."""
    expected = ChatTemplate(CHATML).render([USER])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_fork, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()
    assert ChatTemplate(CHATML).render([USER]) == expected


def test_no_process_is_left(tmp_path):
    script = (
        "from fastllm.data import chat_renderer\nfrom fastllm.data.chat_template import ChatTemplate\n"
        "ChatTemplate('x').render([{'role': 'user', 'content': 'y'}])\n"
        "print(*[r._process.pid for r in chat_renderer._renderers.values()])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_folders(tmp_path):
    def write(name: str, content: Any) -> None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    assert read_chat_template(tmp_path) is None
    write("tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None})
    assert read_chat_template(tmp_path) is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]
    for value, expected in (("c", "c"), (named, "d</s>")):
        write("tokenizer_config.json", {**config, "chat_template": value})
        template = read_chat_template(tmp_path)
        assert template is not None
        assert template.variables == {"bos_token": "<s>", "eos_token": "</s>"}
        assert template.render([USER]) == expected
    write("chat_template.json", {"chat_template": "j"})
    assert read_chat_template(tmp_path).source == "j"
    write("chat_template.jinja", "J")
    assert read_chat_template(tmp_path).source == "J"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not UTF-8"):
        read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    write("chat_template.json", {"chat_template": 7})
    with pytest.raises(UserError, match=r"chat_template\.json: chat_template must be a text, it is 7"):
        read_chat_template(tmp_path)
    (tmp_path / "chat_template.json").unlink()
    write("tokenizer_config.json", {"chat_template": named[:1]})
    with pytest.raises(UserError, match="no template of the name default"):
        read_chat_template(tmp_path)


def test_special_tokens_in_a_text():
    text = "a<|im_end|> b<think>c"
    assert TOKENIZER.encode_with_special(text) == THEIRS(text, split_special_tokens=False)["input_ids"]
    assert list(TOKENIZER.split_special("<|im_end|><|im_end|>x")) == [
        TOKENIZER.backend.token_to_id("<|im_end|>")
    ] * 2 + ["x"]


def test_special_tokens_that_take_the_space_around_them():
    tokenizer = Tokenizer.train(["a b c " * 20], 300)
    added = [AddedToken("<l>", lstrip=True, special=True), AddedToken("<r>", rstrip=True, special=True)]
    tokenizer.backend.add_special_tokens(added)
    tokenizer = Tokenizer(tokenizer.backend)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    for text in ("a  <l> b", "a <r>  b", "<r> <r> <l> <l>", " <l>", "<r> "):
        assert tokenizer.encode_with_special(text) == theirs(text, split_special_tokens=False)["input_ids"]
