"""Files of questions: every layout gives the same, and what is wrong is named by file and row."""

from __future__ import annotations

import pytest

from fastllm.errors import UserError
from fastllm.evaluation import Options, find_tasks, prepare
from fastllm.evaluation.rows import find_split, read_rows

from . import small

SUBJECTS = ("anatomy", "virology")


@pytest.fixture(scope="module")
def model():
    return small.model()


def mmlu(model, data, *, subjects=SUBJECTS, shots=0, **options):
    (task,) = find_tasks(["mmlu"], subjects, shots)
    return prepare(task, data, model.tokenizer, model.max_seq_len, Options(**options))


def as_dicts(rows):
    return [{"question": q, "subject": "anatomy", "choices": choices, "answer": "ABCD".index(letter)}
            for q, *choices, letter in rows]  # fmt: skip


def test_layouts_of_mmlu(tmp_path, model):
    """Its own CSV files, the Hub's Parquet with a folder for each subject or for all, Arrow, and JSON lines."""
    datasets = pytest.importorskip("datasets")
    rows = as_dicts(small.mmlu_rows(3))
    wanted = mmlu(model, small.write_mmlu(tmp_path / "csv", ["anatomy"]), subjects=("anatomy",)).items
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "hub/cais/mmlu/anatomy/test-00000-of-00001.parquet")
    other = [{**row, "subject": "virology"} for row in rows]
    datasets.Dataset.from_list(other + rows).to_parquet(tmp_path / "all/mmlu/all/test-00000-of-00001.parquet")
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "disk/cais--mmlu/anatomy")
    small.write_lines(tmp_path / "lines/anatomy/test.jsonl", rows)
    for folder in ("hub", "all", "disk", "lines"):
        found = mmlu(model, tmp_path / folder, subjects=("anatomy",)).items
        assert [item.sequences for item in found] == [item.sequences for item in wanted], folder


def test_a_csv_file_keeps_quotes_and_line_ends(tmp_path, model):
    path = tmp_path / "test/anatomy_test.csv"
    path.parent.mkdir()
    path.write_bytes('\ufeff"Is ""x"", or\n y\u2028z?",1,2,3,4,C\r\n'.encode())
    (item,) = mmlu(model, tmp_path, subjects=("anatomy",)).items
    assert 'Is "x", or\n y\u2028z?\nA. 1\n' in item.contexts[0]
    assert item.question.gold == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Q?,1,2,3,B", "5 columns, not 6"),
        ("Q?,1,2,3,4,E", "the answer is 'E', not one of A, B, C, D"),
        ("Q?,1,2,3,4,AB", "the answer is 'AB'"),
        ("Q?,1,2,3,4,", "the answer is ''"),
        ("Q?,1,2,3,4,7", "the answer is choice 8, there are 4"),
    ],
)
def test_bad_rows_of_csv(tmp_path, model, line, reason):
    small.write_mmlu(tmp_path, SUBJECTS)
    path = tmp_path / "test/virology_test.csv"
    path.write_text("Good?,1,2,3,4,A\n" + line + "\nGood too?,1,2,3,4,D\n\n")
    with pytest.raises(UserError, match="1 of 6 rows can't be used") as error:
        mmlu(model, tmp_path)
    assert f"{path}, row 2" in str(error.value)
    assert reason in str(error.value)
    made = mmlu(model, tmp_path, skip_bad_rows=True)
    assert len(made.items) == 5
    assert [item.number for item in made.items if item.group == "virology"] == [0, 2]
    assert len(made.bad_rows) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Q?", "choices": ["a", "b", "c"], "answer": 0}, "3 choices, not 4"),
        ({"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 4}, "choice 5, there are 4"),
        ({"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": -1}, "choice 0, there are 4"),
        ({"question": "Q?", "choices": ["a", "b", "c", "d"], "answer": 1.5}, "answer must be a whole number"),
        ({"question": 5, "choices": ["a", "b", "c", "d"], "answer": 1}, "question must be a text, it is 5"),
        ({"question": "Q?", "choices": "abcd", "answer": 1}, "choices must be a list of texts"),
        ({"choices": ["a", "b", "c", "d"], "answer": 1}, "there is no question; it has choices, answer"),
        ([1, 2], "it is [1, 2], not an object"),
    ],
)
def test_bad_rows_of_json(tmp_path, model, row, reason):
    path = small.write_lines(tmp_path / "anatomy/test.jsonl", [*as_dicts(small.mmlu_rows(1)), row])
    with pytest.raises(UserError) as error:
        mmlu(model, tmp_path, subjects=("anatomy",))
    assert f"{path}, row 2" in str(error.value)
    assert reason in str(error.value)


def test_a_choice_that_is_empty(tmp_path, model):
    (task,) = find_tasks(["mmlu_continuation"], ("anatomy",))
    small.write_lines(
        tmp_path / "anatomy/test.jsonl", [{"question": "Q?", "choices": ["a", "", "c", "d"], "answer": 0}]
    )
    with pytest.raises(UserError, match="row 1: a choice is empty"):
        prepare(task, tmp_path, model.tokenizer, model.max_seq_len, Options())


def test_many_bad_rows_are_counted(tmp_path, model):
    small.write_lines(tmp_path / "anatomy/test.jsonl", [{"x": 1}] * 9)
    with pytest.raises(UserError, match=r"9 of 9 rows can't be used: .*row 5: .*; … \(--skip-bad-rows"):
        mmlu(model, tmp_path, subjects=("anatomy",))
    with pytest.raises(UserError, match="the split test has no rows"):
        mmlu(model, tmp_path, subjects=("anatomy",), skip_bad_rows=True)


def test_a_file_of_another_encoding(tmp_path, model):
    small.write_mmlu(tmp_path, SUBJECTS)
    path = tmp_path / "test/anatomy_test.csv"
    path.write_bytes("Good?,1,2,3,4,A\nCaf\xe9?,1,2,3,4,A\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"anatomy_test.csv, line 2: not UTF-8 \(byte 19\)"):
        mmlu(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"a": 1}\n{'), ("a.json", b"[1,"), ("a.csv", b'a,b\n"1'), ("a.arrow", b"ARROW1 no"),
     ("b.arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00"), ("a.parquet", b"PAR1 no"),
     ("c.arrow", b"ARROW1\x00\x00" + bytes(64))],
)  # fmt: skip
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        list(read_rows(tmp_path / name))


def test_missing_subject(tmp_path, model):
    small.write_mmlu(tmp_path, SUBJECTS)
    with pytest.raises(UserError, match=r"lacks the subject anatomi, split test: .*did you mean 'anatomy'"):
        mmlu(model, tmp_path, subjects=("virology", "anatomi"))
    with pytest.raises(UserError, match="lacks the subject abstract_algebra"):
        mmlu(model, tmp_path, subjects=())
    with pytest.raises(UserError, match="lacks the subject anatomy, split dev"):
        mmlu(model, tmp_path, shots=1)


def test_missing_data(tmp_path, model):
    (task,) = find_tasks(["hellaswag"])
    for data, reason in ((None, "--data: which folder"), (tmp_path / "no", "there is no folder"),
                         (tmp_path, "has no folder Rowan/hellaswag or hellaswag")):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            prepare(task, data, model.tokenizer, model.max_seq_len, Options())
    (tmp_path / "hellaswag").mkdir()
    with pytest.raises(UserError, match="has no split validation"):
        prepare(task, tmp_path, model.tokenizer, model.max_seq_len, Options())


def test_splits_are_found(tmp_path):
    for name in ("data/validation-00001-of-00002.parquet", "data/validation-00000-of-00002.parquet", "test/state.json",
                 "test/data-00000-of-00001.arrow", "x_val.jsonl"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name[:16] for file in find_split(tmp_path, "validation")] == ["validation-00000", "validation-00001"]
    assert [file.name for file in find_split(tmp_path, "test")] == ["data-00000-of-00001.arrow"]
    assert find_split(tmp_path, "train") == []
    (tmp_path / "data/validation-00000-of-00002.parquet").unlink()
    (tmp_path / "data/validation-00001-of-00002.parquet").unlink()
    assert [file.name for file in find_split(tmp_path, "validation")] == ["x_val.jsonl"]
