"""What ``fastllm tokenizer inspect`` finds."""

from __future__ import annotations

import io
import json

import pytest
import tokenizers
from rich.console import Console

from fastllm.data import tokenizer_report
from fastllm.data.tokenizer import CHAT_TOKENS, EOS_TOKEN, Tokenizer
from fastllm.data.tokenizer_report import KINDS, OTHER, inspect, kind_of, render

DOCUMENTS = [
    {"text": "some words and some more words, 12345 of them.\n" * 40, "source": "web", "language": "en"},
    {"text": "def add(a, b):\n    return a + b\n" * 40, "source": "code"},
    {"text": "日本語の文字 " * 30, "source": "web", "language": "ja"},
    {"text": "", "source": "web", "language": "en"},
]
TOKENIZER = Tokenizer.train([document["text"] for document in DOCUMENTS], 400, chat=True)


def test_figures():
    report = inspect(TOKENIZER, iter(DOCUMENTS))
    assert json.loads(json.dumps(report)) == report
    lengths = [len(TOKENIZER.encode(document["text"])) for document in DOCUMENTS]
    total = report["text"]["total"]
    assert total["documents"] == 4
    assert total["tokens"] == sum(lengths)
    assert total["bytes"] == sum(len(document["text"].encode()) for document in DOCUMENTS)
    assert total["bytes_per_token"] == total["bytes"] / total["tokens"]
    sources = report["text"]["sources"]
    assert list(sources) == ["web", "code"]
    assert sources["code"]["tokens"] == lengths[1]
    assert sources["web"]["documents"] == 3
    assert sources["code"]["tokens_per_word"] == lengths[1] / (40 * 7)
    languages = report["text"]["languages"]
    assert languages["en"]["tokens"] == lengths[0]
    assert languages["ja"]["words"] == 30
    assert languages["ja"]["characters_per_token"] == 210 / lengths[2]
    assert languages["unknown"]["documents"] == 1


def test_the_vocabulary():
    report = inspect(TOKENIZER, DOCUMENTS)
    vocabulary = report["vocabulary"]
    assert vocabulary["size"] == TOKENIZER.vocab_size == sum(vocabulary["kinds"].values())
    assert [token["text"] for token in vocabulary["special"]] == [EOS_TOKEN, *CHAT_TOKENS]
    assert vocabulary["kinds"]["special"] == 16
    assert vocabulary["kinds"]["byte"] == 256
    sizes = [len(TOKENIZER.token_bytes(t)) for t in range(16, TOKENIZER.vocab_size)]
    assert [token["bytes"] for token in vocabulary["longest"]] == sorted(sizes, reverse=True)[:20]
    used = {i for document in DOCUMENTS for i in TOKENIZER.encode(document["text"])}
    assert report["unused"]["number"] == TOKENIZER.vocab_size - 16 - len(used)
    assert not used & {token["id"] for token in report["unused"]["first"]}
    assert inspect(TOKENIZER, [])["unused"]["number"] == TOKENIZER.vocab_size - 16


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("Ġhello", "word"), ("hello", "letters"), ("ĠÃ©tÃ©", "word"), ("12", "digits"), ("Ġ12", "digits"),
        ("ĠĠĠ", "white space"), ("ĊĊ", "white space"), ("Ġ", "byte"), ("Ã", "byte"), ("Ã¼", "letters"),
        ("æĹ", "partial"), (").", "punctuation"), ("Ġ==", "punctuation"), ("a1", "mixed"), ("()Ċ", "mixed"),
        ("<|tool|>", "special"), (None, "none"),
    ],
)  # fmt: skip
def test_kinds(token, kind):
    content = json.loads(TOKENIZER.backend.to_str())
    content["model"]["vocab"][token or "x"] = 500 + (token is None)
    content["model"]["vocab"].setdefault("zzzz", 502)
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    if kind == "special":
        backend.add_special_tokens([token])
    tokenizer = Tokenizer(backend)
    place = 500 if token is None else backend.token_to_id(token)
    assert kind_of(tokenizer, place) == kind
    assert kind in KINDS


def test_many_sources(monkeypatch):
    monkeypatch.setattr(tokenizer_report, "GROUPS", 3)
    report = inspect(TOKENIZER, [{"text": "a b", "source": str(i)} for i in range(10)])
    assert set(report["text"]["sources"]) == {"0", "1", "2", OTHER}
    assert report["text"]["sources"][OTHER]["documents"] == 7


def test_tables():
    def shown(documents):
        terminal = Console(file=io.StringIO(), width=100, force_terminal=False)
        terminal.print(render(inspect(TOKENIZER, documents)))
        return terminal.file.getvalue()

    text = shown([*DOCUMENTS, {"text": "x", "source": "[red]a\x1b[0m"}])
    for words in ("letters after a space", "<|im_start|> (1)", "longest:", "source web", "language ja", "unused:"):
        assert words in text
    assert "source [red]a\ufffd[0m" in text
    assert "\x1b" not in text
    assert "source" not in shown([])
