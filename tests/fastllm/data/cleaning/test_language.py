from __future__ import annotations

import pytest

from fastllm.data.cleaning import FILTERS, Language
from fastllm.data.cleaning.words import in_english, sample_text
from fastllm.errors import UserError
from tests.fastllm.data.cleaning.samples import TEXTS, document


@pytest.mark.parametrize("language", TEXTS)
def test_languages_are_told_and_kept(language):
    doc = document(TEXTS[language], language="xx")
    assert Language().build()(doc) == ""
    assert doc.metadata["language"] == language and 0.9 < doc.metadata["language_probability"] <= 1


def test_only_the_wanted_are_kept():
    judge = Language(languages=("en", "zh")).build()
    reasons = {language: judge(document(text)) for language, text in TEXTS.items()}
    assert reasons.pop("en") == reasons.pop("zh") == ""
    assert reasons == {language: f"language: {language}" for language in reasons}


def test_an_uncertain_language_is_dropped():
    doc = document("OK.")
    assert Language().build()(doc) == ""
    language, probability = doc.metadata["language"], doc.metadata["language_probability"]
    assert probability < 0.65
    assert Language(languages=(language,)).build()(document("OK.")) == f"language: {language} is uncertain"
    assert Language(languages=(language,), minimum=0.0).build()(document("OK.")) == ""


def test_the_sample_is_bounded_and_from_the_whole_text():
    text = TEXTS["en"] * 1000 + TEXTS["zh"] * 1000
    part = sample_text(text, 1000)
    assert len(part) < 1010 and part.startswith(text[:250]) and part.endswith(text[-250:])
    assert sample_text("short", 100) == "short"


@pytest.mark.parametrize(
    ("metadata", "text", "english"),
    [
        ({"language": "en"}, "zh", True),
        ({"language": "en-US"}, "zh", True),
        ({"language": "English"}, "zh", True),
        ({"language": "eng"}, "zh", True),
        ({"language": "eno"}, "en", False),
        ({"language": "de", "language_probability": 0.9}, "en", False),
        ({"language": "de", "language_probability": 0.3}, "en", True),  # unknown, in Latin letters
        ({"language": "en", "language_probability": 0.3}, "zh", False),  # unknown, in others
        ({"language": "zxx"}, "en", True),
        ({}, "en", True),
        ({}, "zh", False),
        ({}, "ar", False),
        ({}, "th", False),
        ({"language": None, "language_probability": "high"}, "en", True),
    ],
)
def test_where_rules_for_english_apply(metadata, text, english):
    assert in_english(document(TEXTS[text], **metadata)) is english


def test_code_and_plain_text_have_no_language():
    assert FILTERS["language"]().kinds == ("web", "wiki", "book", "table")
    with pytest.raises(UserError, match="kinds must be without code"):
        Language(kinds=("web", "code"))


@pytest.mark.parametrize("code", ["EN", "english", "en-US", ""])
def test_what_is_no_code(code):
    with pytest.raises(UserError, match="is no code of ISO 639"):
        Language(languages=(code,))


def test_a_code_that_the_model_does_not_know():
    with pytest.raises(UserError, match="py3langid does not know 'eng'"):
        Language(languages=("eng",)).build()
