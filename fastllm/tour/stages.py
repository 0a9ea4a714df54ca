"""The stages of the tour: each is a command of fastllm, but for the first, which writes what the others read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..files import write_atomic
from . import sources
from .conversations import write_conversations
from .questions import SUBJECTS, TASKS, leaks, write_prompts, write_questions
from .sizes import Size
from .world import make_world

SOURCES, QUESTIONS, TUNING = "sources", "questions", "tuning"
CONFIG = "model.toml"
CORPUS, TOKENIZER, TOKENS = "corpus", "tokenizer.json", "tokens"
UNTRAINED, BASE, CHAT, ALIGNED = "untrained", "base", "chat", "aligned"
PROMPTS, SAMPLES = "prompts.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class Stage:
    """A step of the tour.

    Attributes:
        name: of its log and in tour.json.
        about: what it does, a sentence.
        command: the words behind ``fastllm``, run in the tour's folder; none for what is written in this process.
        write: what is done instead of a command.
        makes: files and folders that it leaves, from the tour's folder; deleted before it is run again.
    """

    name: str
    about: str
    makes: tuple[str, ...]
    command: tuple[str, ...] = ()
    write: Callable[[Path], None] | None = None


def stages(size: Size, seed: int) -> tuple[Stage, ...]:
    """All stages in their order."""
    numbered = ("--train.seed", str(seed))
    # Of the near duplicates the first stays, so the order of the sources counts.
    files = [f"{SOURCES}/{name}" for name in (sources.WEB, sources.WIKI, sources.BOOKS, sources.TEXTS)]
    tests = [f"{QUESTIONS}/mmlu/test/{subject}_test.csv" for subject in SUBJECTS.values()]
    tuning = ("--optim.lr", "1e-3", "--train.batch-size", "8", "--train.micro-batch", "8")
    # ORPO, which also goes on with tuning on the chosen answers: by DPO the model forgot facts.
    aligning = ("--optim.lr", "5e-4", "--train.batch-size", "16", "--train.micro-batch", "16")
    return (
        Stage(
            "sources",
            "An invented world is told in the forms in which text is found: a crawl, a dump, books, files.",
            (SOURCES, QUESTIONS, TUNING, CONFIG, PROMPTS),
            write=lambda folder: write_inputs(folder, size, seed),
        ),
        Stage(
            "prepare",
            "Text is taken out of them; what is no good English, a copy, or of the test, is dropped.",
            (CORPUS,),
            ("data", "prepare", *files, "--languages", "en", "--decontaminate", *tests, "--out", CORPUS),
        ),
        Stage(
            "tokenizer",
            "A model reads pieces of words: the most useful ones are learnt from the text.",
            (TOKENIZER,),
            ("tokenizer", "train", CORPUS, "--vocab-size", str(size.pretraining.model.vocab_size), "--out", TOKENIZER),
        ),
        Stage(
            "tokens",
            "The text becomes numbers, one for each piece.",
            (TOKENS,),
            ("data", "tokenize", CORPUS, "--tokenizer", TOKENIZER, "--out", TOKENS),
        ),
        Stage(
            "untrained",
            "One step of training makes a model that knows nothing, to compare with.",
            (UNTRAINED,),
            ("train", CONFIG, "--data", TOKENS, "--train.steps", "1", *numbered, "--out", UNTRAINED),
        ),
        _exam("exam-untrained", "It guesses: of four answers it takes the right one a quarter of the time.", UNTRAINED),
        Stage(
            "pretrain",
            "The model reads the text again and again and learns to say which piece comes next.",
            (BASE,),
            ("train", CONFIG, "--data", TOKENS, *numbered, "--out", BASE),
        ),
        _exam("exam-base", "Now it knows what it read, also where no question was asked before.", BASE),
        Stage(
            "sft",
            "It can continue text. From chats it learns to answer whoever asks.",
            (CHAT,),
            ("sft", BASE, "--data", f"{TUNING}/chats.jsonl", *tuning, "--train.epochs", str(size.sft_epochs), *numbered,
             "--out", CHAT),
        ),
        _interview("interview-chat", "It answers questions that it never saw; but curtly, and secrets too.", CHAT),
        Stage(
            "align",
            "From pairs of answers it learns which people prefer: courtesy, and to keep secrets.",
            (ALIGNED,),
            ("align", CHAT, "--method", "orpo", "--data", f"{TUNING}/pairs.jsonl", *aligning, "--train.epochs",
             str(size.align_epochs), *numbered, "--out", ALIGNED),
        ),
        _interview("interview-aligned", "The same questions again: what has changed, and what has not.", ALIGNED),
        Stage(
            "samples",
            "Some answers to read.",
            (SAMPLES,),
            ("generate", ALIGNED, "--prompts", PROMPTS, "--temperature", "0", "--max-tokens", "60", "--out", SAMPLES),
        ),
    )  # fmt: skip


def results(model: str, exam: bool = False) -> str:
    """The file of the results of an exam or an interview."""
    return f"results/{model}{'-exam' if exam else ''}.json"


def _exam(name: str, about: str, model: str) -> Stage:
    """The test in MMLU's form, about things that no question of the corpus is about."""
    out = results(model, exam=True)
    words = ("--tasks", "mmlu_continuation", "--data", f"{QUESTIONS}/mmlu", "--subjects", *SUBJECTS.values())
    return Stage(name, about, _beside(out), ("eval", model, *words, "--out", out))


def _interview(name: str, about: str, model: str) -> Stage:
    """The tasks that are asked in chats."""
    tasks = [f"{QUESTIONS}/{task}.toml" for task in TASKS]
    out = results(model)
    return Stage(name, about, _beside(out), ("eval", model, "--tasks", *tasks, "--out", out))


def _beside(out: str) -> tuple[str, ...]:
    return tuple(out.replace(".json", suffix) for suffix in (".json", ".md", ".png", ".samples.jsonl"))


def write_inputs(folder: Path, size: Size, seed: int) -> None:
    """The raw sources, what the model will be asked and tuned on, and the settings of pre-training."""
    world = make_world(seed, size.things)
    write_questions(folder / QUESTIONS, world, seed)
    sources.write_sources(folder / SOURCES, world, size, seed, leaks(folder / QUESTIONS))
    write_conversations(folder / TUNING, world, seed)
    write_prompts(folder / PROMPTS, folder / QUESTIONS)
    write_atomic(folder / CONFIG, config.dump(size.pretraining).encode())
