"""MMLU: 57 subjects of four categories (Hendrycks et al. 2021, arXiv:2009.03300)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError, did_you_mean
from .rows import BadRow, Row, find_folder, find_split, read_rows
from .task import Question, Task, existing

STEM, HUMANITIES, SOCIAL, OTHER = "STEM", "humanities", "social sciences", "other"
LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS, "answer")  # of the benchmark's own CSV files, which have no header
# Its splits there are called dev, val and test; a folder for each.
CSV_SPLITS = {"dev": "dev", "validation": "val", "test": "test"}

SUBJECTS = {
    STEM: (
        "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    HUMANITIES: (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    SOCIAL: (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    OTHER: (
        "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management",
        "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}  # fmt: skip
CATEGORIES = {subject: category for category, subjects in SUBJECTS.items() for subject in subjects}


@dataclass(frozen=True)
class MmluFiles:
    """The benchmark's own folders of CSV files, or a data set of the Hub with a folder for each subject, or for all."""

    names: tuple[str, ...] = ("cais/mmlu", "hails/mmlu_no_train")

    def split(self, data: Path | None) -> str:
        return "test"

    def rows(self, data: Path | None, split: str, group: str) -> list[Row]:
        folder = existing(data)
        part = CSV_SPLITS[split]
        csv = [root / part / f"{group}_{part}.csv" for root in (folder, folder / "data", folder / "mmlu" / "data")]
        for path in csv:
            if path.is_file():
                return [*read_rows(path, COLUMNS)]
        root = find_folder(folder, self.names) or folder
        if files := find_split(root / group, split):
            return [row for file in files for row in read_rows(file)]
        if files := find_split(root / "all", split):
            rows = [row for file in files for row in read_rows(file) if row.values.get("subject") == group]
            if rows:
                return rows
        near = did_you_mean(group, CATEGORIES) if group not in CATEGORIES else ""
        raise UserError(f"{folder} lacks the subject {group}, split {split}: no {part}/{group}_{part}.csv, no "
                        f"{group}/{split}-*.parquet or the like{near}")  # fmt: skip


def _parts(row: Row) -> tuple[str, list[str], int]:
    """Question, choices and the place of the answer, of either form."""
    if "A" in row.values:
        choices = [row.text(letter) for letter in LETTERS]
    elif not row.problem:
        choices = row.texts("choices")
    else:
        choices = []
    question = row.text("question")
    if len(choices) != len(LETTERS):
        raise BadRow(f"it has {len(choices)} choices, not {len(LETTERS)}")
    answer = row.values.get("answer")
    if isinstance(answer, str) and answer.strip() in tuple(LETTERS):
        return question, choices, LETTERS.index(answer.strip())
    if isinstance(answer, str) and not answer.strip().isdecimal():
        raise BadRow(f"the answer is {answer!r}, not one of {', '.join(LETTERS)}")
    return question, choices, row.integer("answer")


def _letters(row: Row) -> Question:
    question, choices, gold = _parts(row)
    lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return Question(("\n".join((question.strip(), *lines, "Answer:")),), tuple(LETTERS), gold)


def _continuation(row: Row) -> Question:
    question, choices, gold = _parts(row)
    return Question((f"Question: {question.strip()}\nAnswer:",), tuple(choices), gold)


def _described(group: str) -> str:
    return f"The following are multiple choice questions (with answers) about {group.replace('_', ' ')}.\n\n"


def _about(group: str) -> str:
    return f"The following are questions (with answers) about {group.replace('_', ' ')}.\n\n"


MMLU = Task(
    "mmlu", MmluFiles(), _letters, metrics=("acc",), groups=CATEGORIES, shots_split="dev", first_shots=True,
    description=_described,
)  # fmt: skip
MMLU_CONTINUATION = replace(
    MMLU, name="mmlu_continuation", question=_continuation, metrics=("acc", "acc_norm"), description=_about
)


def with_subjects(task: Task, subjects: tuple[str, ...]) -> Task:
    """``task`` of these subjects alone. One that is not of MMLU is a subject without a category."""
    if not subjects:
        return task
    if task.groups is not CATEGORIES:
        raise UserError(f"--subjects goes with mmlu and mmlu_continuation, {task.name} has none")
    return replace(task, groups={subject: CATEGORIES.get(subject, "") for subject in subjects})
