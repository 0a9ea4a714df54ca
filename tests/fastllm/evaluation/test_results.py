"""Standard errors and intervals against other packages' and by hand; comparisons, files, contamination."""

from __future__ import annotations

import json
import math
import random
import statistics as standard
from dataclasses import replace

import pytest

from fastllm.errors import UserError
from fastllm.evaluation import Options, Sample, ask, find_tasks, prepare, results, statistics, summary
from fastllm.evaluation.contamination import contaminated
from fastllm.evaluation.perplexity import perplexity, read_documents, windows
from fastllm.evaluation.run import Log, read_samples

from . import small

SUBJECTS = ("anatomy", "virology", "law_of_mars")


@pytest.fixture(scope="module")
def model():
    return small.model()


@pytest.fixture
def made(tmp_path, model):
    small.write_mmlu(tmp_path, SUBJECTS, 4)
    (task,) = find_tasks(["mmlu"], SUBJECTS)
    return prepare(task, tmp_path, model.tokenizer, model.max_seq_len, Options())


# ---- numbers ----


def test_intervals():
    """The example of Wilson's interval in Brown, Cai & DasGupta (2001), and its ends."""
    low, high = statistics.wilson(15, 20)
    assert (round(low, 4), round(high, 4)) == (0.5313, 0.8881)
    assert statistics.wilson(0, 10)[0] == 0.0
    assert statistics.wilson(10, 10)[1] == 1.0
    assert statistics.wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)


def test_intervals_cover():
    """95 of 100 intervals, about, hold the share that the samples are drawn with."""
    numbers = random.Random(0)
    for share in (0.25, 0.9):
        held = 0
        for _ in range(2000):
            low, high = statistics.wilson(sum(numbers.random() < share for _ in range(60)), 60)
            held += low <= share <= high
        assert 0.93 < held / 2000 < 0.97


def test_stderr_of_groups():
    """The harness's formula for the mean over subjects of unequal sizes."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr, unweighted_mean_stderr

    numbers = random.Random(0)
    groups = [[float(numbers.random() < 0.4) for _ in range(n)] for n in (5, 12, 40)]
    errors, sizes = [mean_stderr(group) for group in groups], [len(group) for group in groups]
    assert statistics.pooled_stderr(groups) == pytest.approx(pooled_sample_stderr(errors, sizes))
    found = statistics.macro("acc", groups)
    assert found["acc_macro"] == pytest.approx(standard.fmean(map(standard.fmean, groups)))
    assert found["acc_macro_stderr"] == pytest.approx(unweighted_mean_stderr(errors))
    one = statistics.rates("acc", groups[:1])
    assert one["acc_stderr"] == pytest.approx(errors[0])


def test_paired():
    """By hand: 7 items right with one model alone, 1 with the other alone, of 20."""
    ours = [1.0] * 7 + [0.0] + [1.0] * 6 + [0.0] * 6
    theirs = [0.0] * 7 + [1.0] + [1.0] * 6 + [0.0] * 6
    found = statistics.paired(ours, theirs)
    assert (found["won"], found["lost"], found["n"]) == (7, 1, 20)
    assert found["difference"] == pytest.approx(0.3)
    assert found["p"] == pytest.approx(2 * (1 + 8) / 2**8)
    assert found["stderr"] == pytest.approx(
        standard.stdev([a - b for a, b in zip(ours, theirs, strict=True)]) / 20**0.5
    )
    same = statistics.paired(ours, ours)
    assert (same["difference"], same["p"]) == (0.0, 1.0)


def test_one_item_has_no_stderr():
    found = statistics.rates("acc", [[1.0]])
    assert math.isnan(found["acc_stderr"])
    assert json.loads(json.dumps(results.finite(found)))["acc_stderr"] is None


def test_summary(made, model):
    found = summary(made, ask(model, made), None)
    assert found["n"] == 12
    assert found["groups"].keys() == {*SUBJECTS}
    assert found["categories"].keys() == {"STEM", "other"}  # a subject that is not of MMLU has none
    assert found["acc"] == pytest.approx(sum(own["acc"] * own["n"] for own in found["groups"].values()) / 12)
    assert found["acc_macro"] == pytest.approx(sum(own["acc"] for own in found["groups"].values()) / 3)
    assert found["stderr"] == found["acc_stderr"]


# ---- files ----


def test_files(tmp_path, made, model):
    found = {"model": "m", "settings": {"dtype": "float32"}, "tasks": {"mmlu": summary(made, ask(model, made), None)}}
    results.write_results(tmp_path / "r.json", found)
    assert results.read_results(tmp_path / "r.json")["tasks"]["mmlu"]["n"] == 12
    text = (tmp_path / "r.md").read_text()
    assert all(f"| {subject} |" in text for subject in SUBJECTS)
    assert "acc, mean of subjects" in text
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="holds no results"):
        results.read_results(tmp_path / "other.json")


def test_what_must_be_known_is_said(made, model):
    task = summary(made, ask(model, made), None) | {"limit": 4, "rows": 99, "truncated": 2, "bad_rows": 1}
    for text in (
        results.table({"tasks": {"mmlu": task}}),
        results.markdown({"model": "", "settings": {}, "tasks": {"mmlu": task}}),
    ):
        assert "mmlu: only the first 4 of the rows of each subject: 12 of 99" in text
        assert "2 prompts were cut off on the left" in text
        assert "1 rows were left out" in text


def test_continues_where_it_was_killed(tmp_path, made, model):
    path = tmp_path / "r.samples.jsonl"
    with Log(path, {"model": 1}) as log:
        whole = ask(model, made, log)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 13
    path.write_bytes(b"".join(lines[:6]) + lines[6][:20])  # killed while it wrote

    asked = []

    class Counting:
        plan = staticmethod(model.plan)

        def score(self, sequences):
            asked.append(len(sequences))
            return model.score(sequences)

    with Log(path, {"model": 1}) as log:
        assert len(log.known) == 5
        assert ask(Counting(), made, log) == whole
    assert asked == [4 * 7]
    assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())
    with pytest.raises(UserError, match="holds answers of another model"), Log(path, {"model": 2}):
        pass
    with Log(path, {"model": 1}) as log:  # of questions in other words, none is known
        other = prepare(made.task, tmp_path, model.tokenizer, model.max_seq_len, Options(chat=False))
        other.items = [replace(item, digest="other words") for item in other.items]
        asked.clear()
        ask(Counting(), other, log)
    assert asked == [4 * 12]


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[]\n", b'{"evaluation": {"model": 1}}\n{"task": 1}\n', b"x\n"])
def test_damaged_samples(tmp_path, content):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(UserError, match=r"s (is no file of samples|holds answers of another)"):
        read_samples(tmp_path / "s", {"model": 1})


def test_comparison(made, model):
    ours = ask(model, made)
    other = {s.key: s for s in ask(small.model(seed=1), made)}
    results.check_comparable(made.items, other)
    found = results.compare(ours, other)["mmlu"]["acc"]
    differences = [s.metrics["acc"] - other[s.key].metrics["acc"] for s in ours]
    assert found["n"] == 12
    assert found["difference"] == pytest.approx(sum(differences) / 12)
    assert (found["won"], found["lost"]) == (differences.count(1.0), differences.count(-1.0))
    changed = {key: Sample(key, "other words", s.metrics) for key, s in other.items()}
    with pytest.raises(UserError, match="no item was asked of both models in the same words"):
        results.check_comparable(made.items, changed)
    text = results.markdown(
        {"model": "a", "settings": {}, "tasks": {}, "comparison": {"model": "b", "tasks": {"mmlu": {"acc": found}}}}
    )
    assert "## Against b, item by item" in text


# ---- contamination ----


def test_contamination(tmp_path, model):
    long = "Which of the many rivers that flow through the old town of Arles is the longest of all?"
    rows = [(f"{long} {i}", "one", "two", "three", "four", "B") for i in range(2)]
    rows += [("Which river is the longest one that flows through Europe from west to east?", *"wxyz", "A"),
             ("The name of the longest river?", *"wxyz", "A"), ("Longest?", *"wxyz", "A")]  # fmt: skip
    path = tmp_path / "test/anatomy_test.csv"
    path.parent.mkdir()
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    (task,) = find_tasks(["mmlu_continuation"], ("anatomy",))
    made = prepare(task, tmp_path, model.tokenizer, model.max_seq_len, Options())
    samples = {task.name: ask(model, made)}
    text = tmp_path / "book.txt"
    text.write_text(
        f"Once upon a time. {long.upper().replace('?', '')} 0 ONE ... Who knows the name of the longest river? W."
    )
    found = contaminated([made], samples, [text])[task.name]
    # The 13 words are in both of the first; the last two have no text of 8 words.
    assert found["numbers"] == [["anatomy", 0], ["anatomy", 1]]
    assert (found["items"], found["too_short"], found["clean"]["n"], found["contaminated"]["n"]) == (2, 2, 3, 2)
    # A shorter question is looked for as a whole, without what the task puts around it.
    text.write_text("x, which river is the longest one that flows through Europe from west to east? w it is.")
    assert contaminated([made], samples, [text])[task.name]["numbers"] == [["anatomy", 2]]
    text.write_text("nothing of it")
    assert contaminated([made], samples, [text])[task.name]["items"] == 0
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        contaminated([made], samples, [tmp_path / "empty.txt"])


# ---- perplexity ----


def test_windows():
    """Each token is scored once, whatever the stride; all windows but the last are full."""
    for length in (1, 2, 5, 8, 20):
        for stride in range(1, length + 1):
            for n in (1, 2, length, length + 1, 3 * length + 1):
                tokens = [*range(100, 100 + n)]
                found = [*windows(tokens, [7], length, stride)]
                assert [t for s in found for t in s.tokens[s.start :]] == tokens
                assert all(s.start >= 1 and len(s.tokens) - 1 <= length for s in found)
                assert all(len(s.tokens) - 1 == length for s in found[1:])


def test_perplexity(model):
    """By hand from the forward pass, of texts that fit into the context and that do not."""
    import torch

    documents = ["Paris is the capital.", "Berlin é " * 100]
    found = perplexity(model, documents, stride=100)
    nats, tokens = 0.0, 0
    for document in documents:
        ids = model.tokenizer.encode(document)
        tokens += len(ids)
        nats -= sum(
            score.log_prob
            for _, scores in model.score([*windows(ids, [model.tokenizer.eos_id], 256, 100)])
            for _, score in scores
        )
    ids = [model.tokenizer.eos_id, *model.tokenizer.encode(documents[0])]
    with torch.no_grad():
        logits = torch.nn.functional.linear(model.gpt.model(torch.tensor([ids])), model.gpt.head_weight)[0]
    own = float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
    short = perplexity(model, documents[:1])
    assert short["bits_per_byte"] == pytest.approx(own / math.log(2) / len(documents[0]))
    assert short["perplexity"] == pytest.approx(math.exp(own / (len(ids) - 1)))
    size = sum(len(document.encode()) for document in documents)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert (found["n"], found["tokens"], found["bytes"]) == (2, tokens, size)
    assert found["stderr"] > 0
    assert perplexity(model, ["パリはフランスの首都" * 40])["word_perplexity"] == math.inf  # one word, for the harness
    with pytest.raises(UserError, match="--stride must be from 1 to the 256"):
        perplexity(model, documents, stride=257)
    with pytest.raises(UserError, match="document 2 is not valid Unicode"):
        perplexity(model, ["a", "b\ud800"])


def test_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one text\n\nof two paragraphs")
    small.write_lines(tmp_path / "b.jsonl", [{"text": "x"}, {"text": " "}, {"text": "y"}])
    assert read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["one text\n\nof two paragraphs", "x", "y"]
    small.write_lines(tmp_path / "c.jsonl", [{"txt": "x"}])
    with pytest.raises(UserError, match=r"c\.jsonl, row 1: there is no text"):
        read_documents([tmp_path / "c.jsonl"])
    (tmp_path / "d.txt").write_text(" ")
    with pytest.raises(UserError, match="hold no text"):
        read_documents([tmp_path / "d.txt"])
