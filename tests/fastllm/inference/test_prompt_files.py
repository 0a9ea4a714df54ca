from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastllm.errors import UserError
from fastllm.inference import Engine, SamplingParams
from fastllm.inference.prompt_files import answer_file

PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(gpt, tokenizer) -> Engine:
    return Engine(gpt, tokenizer, max_batch=2)


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts(engine, tmp_path):
    """More lines than run at once; each has its own options and keeps its keys."""
    lines = [{"prompt": "def f" + "x" * i, "id": i, "max_tokens": 1 + i % 5} for i in range(25)]
    source, out = written(tmp_path / "in.jsonl", *lines, "\n"), tmp_path / "out.jsonl"
    assert answer_file(engine, source, out, PARAMS) == 0
    found = read(out)
    assert [{key: f[key] for key in line} for f, line in zip(found, lines, strict=True)] == lines
    assert [f["completion_tokens"] for f in found] == [1 + i % 5 for i in range(25)]
    expected = engine.generate([lines[7]["prompt"]], PARAMS, max_tokens=3)[0]
    assert (found[7]["text"], found[7]["finish_reason"]) == (expected.text, "length")


def test_what_is_answered_is_not_answered_again(engine, tmp_path):
    """As after a loss of power: whole lines stay, half a line is written again."""
    lines = [{"prompt": f"def {i}"} for i in range(6)]
    source, out = written(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    answer_file(engine, source, out, PARAMS)
    whole = out.read_bytes()
    kept = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:2]) + kept[2][:9])
    before = engine.stats.generated_tokens
    answer_file(engine, source, out, PARAMS)
    assert out.read_bytes() == whole
    assert engine.stats.generated_tokens - before == 4 * 6
    with pytest.raises(UserError, match="is not of these prompts"):
        answer_file(engine, written(tmp_path / "other.jsonl", {"prompt": "class"}), out, PARAMS)
    assert out.read_bytes() == whole


def test_lines_without_an_answer(engine, tmp_path, capsys):
    wrong = [
        '{"prompt": 3}\n', "[1]\n", "{\n", {"prompt": "x" * 2000}, {"prompt": "a", "temperature": -1},
        {"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "a", "top_k": "many"},
    ]  # fmt: skip
    source, out = written(tmp_path / "in.jsonl", {"prompt": "a"}, *wrong, {"prompt": "b"}), tmp_path / "out.jsonl"
    assert answer_file(engine, source, out, PARAMS) == 1
    found = read(out)
    assert len(found) == 9
    assert ["error" in f for f in found] == [False, *[True] * 7, False]
    assert found[5]["error"] == "line 6: temperature must be a number from 0, it is -1"
    assert "7 lines have no answer" in capsys.readouterr().err
    assert answer_file(engine, source, out, PARAMS) == 0  # they are not tried again
    assert read(out) == found


def test_a_prompt_a_line(engine, tmp_path, capfdbinary):
    source = written(tmp_path / "in.txt", "def f\n", "\n", "class é\r\n")
    assert answer_file(engine, source, None, PARAMS) == 0
    found = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [f["prompt"] for f in found] == ["def f", "class é"]


def test_several_answers(engine, tmp_path):
    source, out = written(tmp_path / "in.jsonl", {"prompt": "a", "n": 3, "logprobs": 0}), tmp_path / "out.jsonl"
    answer_file(engine, source, out, PARAMS)
    (found,) = read(out)
    assert len(found["texts"]) == len(found["logprobs"]) == 3
    assert found["completion_tokens"] == 18


def test_a_file_that_is_not_there(engine, tmp_path):
    with pytest.raises(UserError, match="can't read the prompts"):
        answer_file(engine, tmp_path / "none.jsonl", None, PARAMS)
    with pytest.raises(UserError, match="can't write"):
        answer_file(engine, written(tmp_path / "in.txt", "a\n"), tmp_path / "none" / "out.jsonl", PARAMS)
