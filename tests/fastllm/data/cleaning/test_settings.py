from __future__ import annotations

import dataclasses
import tomllib
from typing import get_type_hints

import pytest

from fastllm.data.cleaning import C4, FILTERS, Gopher, build, settings
from fastllm.errors import UserError
from tests.fastllm.data.cleaning.samples import TEXTS, document

KINDS = ("web", "wiki", "book", "table", "text", "code")


def test_the_order():
    assert list(FILTERS) == ["normalisation", "language", "gopher", "c4", "fineweb", "repetition", "personal"]
    assert [cls.name for cls in FILTERS.values()] == list(FILTERS)


def test_which_kinds_by_default():
    by_kind = {kind: [name for name, cls in FILTERS.items() if kind in cls().kinds] for kind in KINDS}
    assert by_kind == {
        "web": list(FILTERS),
        "table": list(FILTERS),
        "wiki": ["normalisation", "language"],
        "book": ["normalisation", "language"],
        "text": ["normalisation"],
        "code": [],
    }


@pytest.mark.parametrize("cls", FILTERS.values(), ids=FILTERS)
def test_fields_fit_into_toml(cls):
    hints = get_type_hints(cls)
    assert {hints[field.name] for field in dataclasses.fields(cls)} <= {int, float, bool, str, tuple[str, ...]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().enabled = False


def test_a_recipe():
    tables = tomllib.loads("""
        [filters.gopher]
        min_words = 5
        max_word_length = 12
        kinds = ["book"]
        [filters.c4]
        enabled = false
    """)["filters"]
    made = settings(tables)
    assert list(made) == list(FILTERS)
    assert made["gopher"] == Gopher(min_words=5, max_word_length=12.0, kinds=("book",))
    assert type(made["gopher"].max_word_length) is float and made["c4"] == C4(enabled=False)
    assert settings(made) == made


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"gofer": {}}, "filters: no filter 'gofer'; did you mean 'gopher'?"),
        ({"gopher": {"min_word": 1}}, "filters.gopher: unknown key 'min_word'; did you mean 'min_words'"),
        ({"gopher": True}, "filters.gopher must be a table"),
        ({"gopher": {"min_words": 1.5}}, "filters.gopher.min_words must be a whole number, not negative, it is 1.5"),
        ({"gopher": {"min_words": True}}, "filters.gopher.min_words must be a whole number"),
        ({"gopher": {"min_words": -1}}, "filters.gopher.min_words must be a whole number, not negative, it is -1"),
        ({"gopher": {"max_words": 49}}, "filters.gopher.max_words must be at least min_words"),
        ({"gopher": {"max_word_length": 2}}, "filters.gopher.max_word_length must be at least min_word_length"),
        ({"gopher": {"stop_words": ["the"]}}, "filters.gopher.min_stop_words must be at most 1"),
        ({"gopher": {"stop_words": "the"}}, "filters.gopher.stop_words must be a list of strings, it is 'the'"),
        ({"gopher": {"stop_words": [1]}}, "filters.gopher.stop_words must be a list of strings"),
        ({"gopher": {"max_bullet_lines": 90}}, "filters.gopher.max_bullet_lines must be at most 1, it is 90.0"),
        ({"gopher": {"max_hashes": float("nan")}}, "filters.gopher.max_hashes must be a number"),
        ({"gopher": {"enabled": 1}}, "filters.gopher.enabled must be true or false, it is 1"),
        ({"gopher": {"kinds": ["webs"]}}, "filters.gopher.kinds: no kind 'webs'; did you mean 'web'?"),
        ({"personal": {"email": 1}}, "filters.personal.email must be a string, it is 1"),
        ({"language": {"minimum": 65}}, "filters.language.minimum must be at most 1"),
        ({"language": {"sample": 1}}, "filters.language.sample must be at least 100"),
        ({"c4": {"max_word_length": 0}}, "filters.c4.max_word_length must be at least 1"),
        ({"repetition": {"top_2_gram": "0.2"}}, "filters.repetition.top_2_gram must be a number"),
    ],
)
def test_what_is_wrong_is_named(tables, message):
    with pytest.raises(UserError) as error:
        build(tables)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_first_filter_that_drops_is_named():
    clean = build({"gopher": {"min_words": 10_000}})
    doc = document(TEXTS["en"])
    assert clean(doc) == ("gopher", "gopher: fewer than 10000 words")
    assert doc.metadata["language"] == "en" and doc.metadata["gopher"] == {"words": 79} and "c4" not in doc.metadata


def test_a_disabled_filter_does_not_run():
    clean = build({name: {"enabled": False} for name in FILTERS})
    doc = document("x\r\n")
    assert clean(doc) is None and doc.text == "x\r\n" and doc.metadata == {}


def test_code_is_never_changed_and_text_is_normalised():
    text = "@property\r\ndef mail(self):\t# jane@company.de, 8.8.8.8\x00\n"
    code, plain = document(text, kind="code"), document(text, kind="text")
    clean = build({})
    assert clean(code) is None and code.text == text and code.metadata == {}
    assert clean(plain) is None and plain.text == text.replace("\r", "").replace("\x00", "")


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_good_text_is_kept_in_every_language(language, kind):
    doc = document(TEXTS[language], kind)
    assert build({})(doc) is None
    assert doc.text == TEXTS[language]


@pytest.mark.parametrize("language", ["ru", "zh", "ja", "ko", "ar", "fa", "he", "hi", "ml", "th"])
def test_no_script_is_dropped_where_the_language_is_unknown(language):
    doc = document(TEXTS[language])
    assert build({"language": {"enabled": False}})(doc) is None
    assert doc.text == TEXTS[language]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", " \n\t\n ", "a", "\n", "...", "😀" * 30, "\u0301", "1 2 3", "\u202eabc"])
def test_small_texts(kind, text):
    """Whatever is enabled, a text that has next to nothing gets a reason or is kept; it is no error."""
    for name in FILTERS:
        others = {other: {"enabled": False} for other in FILTERS if other != name}
        result = build(others)(document(text, kind))
        assert result is None or (result[0] == name and result[1].startswith(f"{name}: "))
