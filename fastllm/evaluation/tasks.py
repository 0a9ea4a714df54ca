"""The tasks that fastllm knows: the questions as lm-evaluation-harness asks them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError, did_you_mean
from .mmlu import MMLU, MMLU_CONTINUATION, with_subjects
from .rows import BadRow, Row
from .task import DataSet, Generation, Question, Task


def _one(prompt: str, choices: Sequence[str], gold: int) -> Question:
    return Question((prompt,), tuple(choices), gold)


def _labelled(row: Row, prompt: str) -> Question:
    """A question whose choices have labels, of which the answer is one."""
    choices, key = row.table("choices"), row.text("answerKey").strip()
    labels = choices.texts("label")
    if key not in labels:
        raise BadRow(f"the answer is {key!r}, not one of {', '.join(labels)}")
    return _one(prompt, choices.texts("text"), labels.index(key))


def _hellaswag(row: Row) -> Question:
    def cleaned(text: str) -> str:  # of what WikiHow's pages left
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    prompt = f"{row.text('activity_label')}: {row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    return _one(cleaned(prompt), [cleaned(ending) for ending in row.texts("endings")], row.integer("label"))


def _piqa(row: Row) -> Question:
    return _one(f"Question: {row.text('goal')}\nAnswer:", [row.text("sol1"), row.text("sol2")], row.integer("label"))


def _arc(row: Row) -> Question:
    return _labelled(row, f"Question: {row.text('question')}\nAnswer:")


def _openbookqa(row: Row) -> Question:
    return _labelled(row, row.text("question_stem"))


def _commonsense_qa(row: Row) -> Question:
    found = _labelled(row, "")
    labels = row.table("choices").texts("label")
    lines = (f"{label}. {choice}" for label, choice in zip(labels, found.choices, strict=True))
    return _one("\n".join((f"Question: {row.text('question').strip()}", *lines, "Answer:")), labels, found.gold)


def _winogrande(row: Row) -> Question:
    sentence, answer = row.text("sentence"), row.integer("answer")
    before, gap, after = sentence.partition("_")
    if not gap:
        raise BadRow("the sentence has no _")
    prompts = before + row.text("option1"), before + row.text("option2")
    return Question(prompts, (after.strip(),) * 2, answer - 1)


def _boolq(row: Row) -> Question:
    gold = row.integer("label" if "label" in row.values else "answer")
    return _one(f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:", ("no", "yes"), gold)


def _sciq(row: Row) -> Question:
    choices = [row.text(key) for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _one(f"{row.text('support').lstrip()}\nQuestion: {row.text('question')}\nAnswer:", choices, 3)


def _social_iqa(row: Row) -> Question:
    choices = [row.text(key) for key in ("answerA", "answerB", "answerC")]
    return _one(f"Q: {row.text('context')} {row.text('question')}\nA:", choices, row.integer("label") - 1)


def _copa(row: Row) -> Question:
    connectors = {"cause": "because", "effect": "therefore"}
    if (kind := row.text("question")) not in connectors:
        raise BadRow(f"question is {kind!r}, not cause or effect")
    choices = [row.text(key) for key in ("choice1", "choice2")]
    if not all(choices):
        raise BadRow("a choice is empty")
    choices = [f" {choice[0].lower()}{choice[1:]}" for choice in choices]
    return _one(f"{row.text('premise').strip()[:-1]} {connectors[kind]}", choices, row.integer("label"))


def _gsm8k(row: Row) -> Question:
    return _one(f"Question: {row.text('question')}\nAnswer:", (row.text("answer"),), 0)


def _choice(
    name: str, names: tuple[str, ...], question: Callable[[Row], Question], config: str = "", *, norm: bool = True,
    tested: bool = False,
) -> Task:  # fmt: skip
    """``tested``: the data set has a test split with answers, which is then asked where it is there."""
    source = DataSet(names, config, ("test", "validation") if tested else ("validation",))
    return Task(name, source, question, ("acc", "acc_norm") if norm else ("acc",), spare_shot=not tested)


GSM8K = Task(
    "gsm8k", DataSet(("openai/gsm8k", "gsm8k"), "main", ("test",)), _gsm8k, ("exact_match", "strict_match"), shots=5,
    generation=Generation(
        stop=("Question:", "</s>", "<|im_end|>"), extract=r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
        strict=r"#### (\-?[0-9\.\,]+)", ignore=(",", r"\$", "(?s).*#### ", r"\.$"), ignore_case=True,
    ),
)  # fmt: skip

TASKS = {
    task.name: task
    for task in (
        MMLU,
        MMLU_CONTINUATION,
        _choice("hellaswag", ("Rowan/hellaswag", "hellaswag"), _hellaswag),
        _choice("piqa", ("baber/piqa", "ybisk/piqa", "piqa"), _piqa),
        _choice("arc_easy", ("allenai/ai2_arc", "ai2_arc"), _arc, "ARC-Easy", tested=True),
        _choice("arc_challenge", ("allenai/ai2_arc", "ai2_arc"), _arc, "ARC-Challenge", tested=True),
        _choice("winogrande", ("allenai/winogrande", "winogrande"), _winogrande, "winogrande_xl", norm=False),
        _choice("boolq", ("aps/super_glue/boolq", "super_glue/boolq", "google/boolq", "boolq"), _boolq, norm=False),
        _choice("openbookqa", ("allenai/openbookqa", "openbookqa"), _openbookqa, "main", tested=True),
        _choice("sciq", ("allenai/sciq", "sciq"), _sciq, tested=True),
        _choice("commonsense_qa", ("tau/commonsense_qa", "commonsense_qa"), _commonsense_qa, norm=False),
        _choice("social_iqa", ("lighteval/siqa", "allenai/social_i_qa", "social_i_qa"), _social_iqa, norm=False),
        _choice("copa", ("aps/super_glue/copa", "super_glue/copa", "copa"), _copa, norm=False),
        GSM8K,
    )
}


def find_tasks(names: Sequence[str], subjects: tuple[str, ...] = (), shots: int | None = None) -> list[Task]:
    """The tasks of these names, or of files of the user's own.

    Args:
        subjects: those of MMLU to ask; none: all.
        shots: in place of each task's own number.

    Raises:
        UserError: there is no such task, a file is wrong, or two tasks have one name.
    """
    from .user_tasks import read_tasks

    found: list[Task] = []
    for name in names:
        if name in TASKS:
            found.append(TASKS[name])
        elif name.endswith((".toml", ".py")):
            found += read_tasks(Path(name))
        else:
            raise UserError(
                f"there is no task {name!r}{did_you_mean(name, TASKS)}; one of your own is a .toml or .py file"
            )
    twice = sorted({task.name for task in found if sum(other.name == task.name for other in found) > 1})
    if twice:
        raise UserError(f"--tasks: {', '.join(twice)} more than once")
    if subjects:
        found = [with_subjects(task, subjects) for task in found]
    return found if shots is None else [replace(task, shots=shots) for task in found]
