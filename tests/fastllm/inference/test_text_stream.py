from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data.tokenizer import Tokenizer
from fastllm.inference.text_stream import TextStream


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """A token for each byte, and few more."""
    return Tokenizer.train(["é日本👩‍👩‍👧 stop"], 272, chat=True)


def pieces(tokenizer: Tokenizer, text: str, stop: list[str]) -> tuple[list[str], bool]:
    stream, found = TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text):
        new, stopped = stream.add(token)
        found.append(new)
        if stopped:
            return found, True
    found.append(stream.finish())
    assert "".join(found) == stream.text
    return found, False


@settings(max_examples=200, deadline=None)
@given(st.text("ab日é👩 ", max_size=12), st.lists(st.text("ab日é", min_size=1, max_size=4), max_size=3))
def test_no_half_character_and_no_part_of_a_stop_text(bytewise, text, stop):
    found, stopped = pieces(bytewise, text, stop)
    ends = [text.index(s) for s in stop if s in text]
    assert stopped == bool(ends)
    assert all("\ufffd" not in piece for piece in found)
    shown = "".join(found)
    # a stop text that ends first may begin after one that is still to come
    assert text.startswith(shown) and not any(s in shown for s in stop)
    if not stop or not ends:
        assert shown == text


def test_bytes_that_are_no_text(bytewise):
    stream = TextStream(bytewise)
    (first, *_) = bytewise.encode("日")
    assert stream.add(first) == ("", False)
    assert stream.add(bytewise.encode("a")[0]) == ("\ufffda", False)
    assert stream.add(first) == ("", False)
    assert stream.finish() == "\ufffd"


def test_special_tokens_have_no_text(bytewise):
    stream = TextStream(bytewise)
    for token in bytewise.special_ids:
        assert stream.add(token) == ("", False)
    assert stream.text == ""
