"""Prompts that don't fit, tokenizers that split in surprising ways, and tasks of the user's own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tokenizers import AddedToken

from fastllm.errors import UserError
from fastllm.evaluation import GPTModel, Options, ask, find_tasks, prepare, summary
from fastllm.evaluation.items import encode_pair

from . import small

ONE = ("anatomy",)


def mmlu(model, data, shots=0, **options):
    (task,) = find_tasks(["mmlu"], ONE, shots)
    return prepare(task, data, model.tokenizer, model.max_seq_len, Options(**options))


@pytest.fixture
def data(tmp_path):
    small.write_mmlu(tmp_path, ONE)
    return small.write_mmlu(tmp_path, ONE, 5, "dev", first=50)


def test_prompts_longer_than_the_context(data):
    longest = max(len(s.tokens) - 1 for item in mmlu(small.model(2048), data, 5).items for s in item.sequences)
    exact = mmlu(small.model(longest), data, 5)
    assert [item.shots for item in exact.items] == [5, 5, 5]
    model = small.model(longest - 1)
    with pytest.raises(UserError, match=r"3 of 3 prompts are longer than the .* the first, .*anatomy_test.csv, row 1"):
        mmlu(model, data, 5)
    fewer = mmlu(model, data, 5, too_long="fewer-shots")
    assert [item.shots for item in fewer.items] == [4, 4, 4]
    assert fewer.counts["fewer_shots"] == 3
    assert "truncated" not in fewer.counts
    found = summary(fewer, ask(model, fewer), None)
    assert (found["fewer_shots"], found["fewest_shots"], found["shots"]) == (3, 4, 5)
    cut = mmlu(model, data, 5, too_long="truncate")
    assert all(len(s.tokens) == longest for item in cut.items for s in item.sequences)
    assert cut.counts["truncated"] == 3
    assert summary(cut, ask(model, cut), None)["truncated"] == 3
    with pytest.raises(UserError, match="prompts are longer"):
        mmlu(small.model(10), data, 5, too_long="fewer-shots")


def test_too_few_shots(data):
    with pytest.raises(UserError, match="mmlu: 6 shots need 6 rows of the split dev, it has 5"):
        mmlu(small.model(2048), data, 6)


def test_limit(data):
    made = mmlu(small.model(), data, limit=2)
    assert [item.number for item in made.items] == [0, 1]
    assert summary(made, ask(small.model(), made), 2)["limit"] == 2
    whole = mmlu(small.model(), data, limit=3)
    assert "limit" not in summary(whole, ask(small.model(), whole), 3)


def test_a_tokenizer_that_joins_prompt_and_choice(data):
    """The letter with what stands before it is one token: scored from the first token that the choice changes."""
    model = small.model()
    model.tokenizer.backend.add_tokens([AddedToken(f": {letter}", normalized=False) for letter in "ABCD"])
    made = mmlu(GPTModel(model.gpt, model.tokenizer), data)
    assert made.counts["retokenized"] == 12
    for item in made.items:
        for tokens, start in item.sequences:
            assert len(tokens) == start + 1
    letters = {sequence.tokens[-1] for sequence in made.items[0].sequences}
    assert {model.tokenizer.decode([letter]) for letter in letters} == {": A", ": B", ": C", ": D"}


def test_a_tokenizer_without_the_letters(data):
    model = small.model()
    encode = model.tokenizer.encode
    model.tokenizer.encode = lambda text, **options: encode(text.replace(" D", " C").replace(" B", " C"), **options)
    with pytest.raises(UserError, match="row 1: the tokenizer encodes two different choices to the same tokens"):
        mmlu(model, data)


def test_pairs():
    """Spaces at a context's end go with the continuation; an empty context is the token that begins a text."""
    tokenizer = small.model().tokenizer
    encode = tokenizer.encode
    with_space, _ = encode_pair(encode, "Answer: ", encode("Answer: "), "Paris")
    without, _ = encode_pair(encode, "Answer:", encode("Answer:"), " Paris")
    assert with_space == without
    begins, _ = encode_pair(encode, "", [7], "Paris")
    assert ([*begins.tokens], begins.start) == ([7, *encode("Paris")], 1)

    def with_bos(text):
        return [7, *encode(text)]

    begins, _ = encode_pair(with_bos, "", with_bos(""), "Paris")
    assert ([*begins.tokens], begins.start) == ([7, *encode("Paris")], 1)
    with pytest.raises(UserError, match="no token to score"):
        encode_pair(encode, "A", encode("A"), "")


def test_chat_needs_a_template(data):
    with pytest.raises(UserError, match="no chat template"):
        mmlu(small.model(), data, chat=True)


def test_chat_prompts(data):
    model = small.model(512, chat=True)
    made = mmlu(model, data, 1, chat=True)
    text = made.items[0].contexts[0]
    assert text.startswith(
        "<|im_start|>system\nThe following are multiple choice questions (with answers) about anatomy."
    )
    assert "Answer:<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nWhat is 0 + 1?" in text
    assert text.endswith("<|im_start|>assistant\n")
    (sequence, *_) = made.items[0].sequences
    assert sequence.tokens[0] == model.tokenizer.special_tokens["<|im_start|>"][0]


# ---- tasks of the user's own ----

CHOICE = """
name = "capitals"
files = ["q.jsonl"]
shots_files = ["shots.jsonl"]
context = "Capital of {{{land}}}:"
choices = ["{a}", "{b}"]
answer = "{right}"
"""


def own(tmp_path, text, rows, name="own.toml"):
    small.write_lines(tmp_path / "q.jsonl", rows)
    small.write_lines(tmp_path / "shots.jsonl", rows)
    (tmp_path / name).write_text(text)
    return find_tasks([str(tmp_path / name)])[0]


@pytest.mark.parametrize("right", ["B", "1", 1, "Paris"])
def test_a_task_of_toml(tmp_path, right):
    task = own(tmp_path, CHOICE, [{"land": "France", "a": "Rome", "b": "Paris", "right": right}])
    model = small.model()
    (item,) = prepare(task, None, model.tokenizer, model.max_seq_len, Options()).items
    assert item.contexts == ("Capital of {France}:",)
    assert (item.question.choices, item.question.gold) == (("Rome", "Paris"), 1)
    assert model.tokenizer.decode(item.sequences[1].tokens) == "Capital of {France}: Paris"
    (item,) = prepare(replace(task, shots=1), None, model.tokenizer, model.max_seq_len, Options()).items
    assert item.contexts == ("Capital of {France}: Paris\n\nCapital of {France}:",)


def test_a_list_of_choices(tmp_path):
    text = CHOICE.replace('["{a}", "{b}"]', '"{options}"')
    task = own(tmp_path, text, [{"land": "France", "options": ["x", "y", "z"], "right": "C"}])
    model = small.model()
    (item,) = prepare(task, None, model.tokenizer, model.max_seq_len, Options()).items
    assert (item.question.choices, item.question.gold) == (("x", "y", "z"), 2)


GENERATION = """
kind = "generation"
files = ["q.jsonl"]
chat = true
context = "{question}"
max_tokens = 5
stop = ["."]
"""


def test_generation(tmp_path):
    model = small.model(chat=True)
    rows = [{"question": "Paris?", "right": "yes"}, {"question": "Rome?", "right": "no"}]
    task = own(tmp_path, GENERATION + 'target = "{right}"', rows)
    made = prepare(task, None, model.tokenizer, model.max_seq_len, Options())
    samples = ask(model, made)
    assert [sample.metrics for sample in samples] == [{"exact_match": 0.0}] * 2
    answers = [sample.text for sample in samples]
    right = [{"question": row["question"], "right": f" {text} "} for row, text in zip(rows, answers, strict=True)]
    task = own(tmp_path, GENERATION + 'target = "{right}"', right)
    made = prepare(task, None, model.tokenizer, model.max_seq_len, Options())
    assert [sample.metrics for sample in ask(model, made)] == [{"exact_match": 1.0}] * 2
    task = own(tmp_path, GENERATION + r"pattern = '^\w{1}'", rows)
    made = prepare(task, None, model.tokenizer, model.max_seq_len, Options())
    found = [sample.metrics["match"] for sample in ask(model, made)]
    assert found == [float(text[:1].isalnum() or text[:1] == "_") for text in answers]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CHOICE + 'kind = "guess"', "kind must be multiple_choice or generation, it is 'guess'"),
        (CHOICE + "max_tokens = 5", "multiple_choice has no key 'max_tokens'"),
        (CHOICE + "contxt = 5", "has no key 'contxt'; did you mean 'context'"),
        (CHOICE + "shots = true", "shots must be a whole number, it is True"),
        (CHOICE.replace('["q.jsonl"]', "[5]"), "files must be a list of texts"),
        (CHOICE.replace("q.jsonl", "none.jsonl"), "there is no file"),
        (CHOICE.replace("answer =", "#"), "answer is missing"),
        (GENERATION, "generation needs target or pattern"),
        (GENERATION + 'target = "a"\npattern = "b"', "generation needs target or pattern"),
        (GENERATION + 'pattern = "("', r"pattern '\(' is no regular expression"),
        (GENERATION.replace("= 5", "= 0") + 'target = "a"', "max_tokens must be at least 1"),
        (CHOICE.replace("{land}", "{ land }"), r"context: .*land.* is no \{field\} of a row"),
        (CHOICE.replace('["{a}", "{b}"]', '"{a} or"'), r"choices must be a list, or the \{field\} of one"),
        (CHOICE + "shots = -1", "shots must not be negative"),
        (GENERATION + 'pattern = ""', "pattern is empty"),
        (GENERATION.replace('["."]', '[""]') + 'target = "a"', "stop is empty"),
        (GENERATION + f'pattern = "x{{{10**30}}}"', "is no regular expression"),
        ("=", "is not valid TOML"),
    ],
)
def test_bad_task_files(tmp_path, text, reason):
    with pytest.raises(UserError, match=reason):
        own(tmp_path, text, [{"a": "x"}])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a": "x", "b": "y", "right": "A"}, "there is no land; it has a, b, right"),
        ({"land": "F", "a": "x", "b": "y", "right": "C"}, "the answer is choice 3, there are 2"),
        ({"land": "F", "a": "x", "b": "y", "right": "France"}, "the answer 'France' is none of the choices"),
        ({"land": "F", "a": "B", "b": "A", "right": "A"}, "the answer 'A' may be choice 1 or 2"),
        ({"land": "F", "a": "1", "b": "0", "right": "1"}, "the answer '1' may be choice 1 or 2"),
        ({"land": "F", "a": "x", "b": "x", "right": "x"}, "may be choice 1 or 2"),
        ({"land": "F", "a": "x", "b": "y", "right": "9" * 5000}, "is none of the choices"),
        ({"land": math.nan, "a": "x", "b": "y", "right": "A"}, "land must be a text"),
        ({"land": "\ud800", "a": "x", "b": "y", "right": "A"}, "a text is not valid Unicode"),
        ({"land": ["F"], "a": "x", "b": "y", "right": "A"}, "land must be a text"),
    ],
)
def test_bad_rows_of_own_tasks(tmp_path, row, reason):
    task = own(tmp_path, CHOICE, [row])
    with pytest.raises(UserError, match="row 1") as error:
        prepare(task, None, small.model().tokenizer, 100, Options())
    assert reason in str(error.value)


def test_a_task_of_python(tmp_path):
    text = """
from fastllm.evaluation import Files, Question, Task
from pathlib import Path

def question(row):
    return Question((row.text("q"),), ("yes", "no"), row.integer("right"))

TASK = Task("mine", Files((Path(__file__).with_name("q.jsonl"),)), question, metrics=("acc",))
"""
    task = own(tmp_path, text, [{"q": "Is it?", "right": 1}], "own.py")
    model = small.model()
    made = prepare(task, None, model.tokenizer, model.max_seq_len, Options())
    assert summary(made, ask(model, made), None)["n"] == 1
    star = "from fastllm.evaluation import *\nfrom pathlib import Path\n" + text.replace("from fastllm", "#")
    assert own(tmp_path, star, [], "star.py").name == "mine"
    failing = text.replace('row.integer("right")', "1 / 0")
    task = own(tmp_path, failing, [{"q": "Is it?"}], "failing.py")
    with pytest.raises(UserError, match="row 1: ZeroDivisionError"):
        prepare(task, None, model.tokenizer, model.max_seq_len, Options())
    for content, reason in (
        ("import sys; sys.exit(0)", "failed: SystemExit"),
        ("1 / 0", "failed: ZeroDivisionError"),
        ("TASK = 5", "must set TASK"),
        ("", "must set TASK"),
    ):
        with pytest.raises(UserError, match=reason):
            own(tmp_path, content, [], "bad.py")


@pytest.mark.parametrize("change", ['delimiter = "-"', 'target = "{other}"', "max_tokens = 4", 'ignore = ["x"]'])
def test_what_changes_an_answer_is_in_the_digest(tmp_path, change):
    """So that an answer to the same question in other circumstances is not taken for it."""
    rows = [{"question": "Q?", "land": "F", "a": "x", "b": "y", "right": "A", "other": "B"}]
    before = CHOICE if "delimiter" in change else GENERATION + 'target = "{right}"\n'
    if "target" in change:
        after = before.replace('target = "{right}"', change)
    else:
        after = before.replace("max_tokens = 5", "" if "max_tokens" in change else "max_tokens = 5") + change
    model = small.model(chat=True)
    digests = [prepare(own(tmp_path, text, rows), None, model.tokenizer, model.max_seq_len, Options()).items[0].digest
               for text in (before, before, after)]  # fmt: skip
    assert digests[0] == digests[1] != digests[2]


def test_unknown_tasks():
    with pytest.raises(UserError, match="there is no task 'helaswag'; did you mean 'hellaswag'"):
        find_tasks(["helaswag"])
    with pytest.raises(UserError, match="copa more than once"):
        find_tasks(["copa", "copa"])
    with pytest.raises(UserError, match="--subjects goes with mmlu"):
        find_tasks(["copa"], ("anatomy",))
