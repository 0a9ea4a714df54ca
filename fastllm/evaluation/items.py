"""The items of an evaluation: each question of each task with its prompt, and the tokens to score."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from .rows import Row
from .scoring import Scored
from .task import SHOWN_ROWS, Question, Task, prompt_text, shots_of

Encode = Callable[[str], list[int]]
TooLong = Literal["error", "fewer-shots", "truncate"]


@dataclass(frozen=True)
class Item:
    """A question, ready to be asked.

    Attributes:
        task, group, number: which it is; ``number`` is that of its row in the split, counted from 0.
        question: what is asked.
        contexts: the prompts as the model reads them: one, or one for each choice.
        row: where it is from.
        digest: equal ones are of the same question, asked and judged in the same way.
        sequences: by choice, the tokens to score; of a generation task none.
        prompt: of a generation task, the tokens to continue.
        shots: that the prompt has.
        retokenized: choices that the tokenizer joins with the end of their prompt.
    """

    task: str
    group: str
    number: int
    question: Question
    contexts: tuple[str, ...]
    row: Row
    digest: str
    sequences: tuple[Scored, ...] = ()
    prompt: tuple[int, ...] = ()
    shots: int = 0
    retokenized: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.group, self.number


@dataclass
class Prepared:
    """A task's items, and what is to be said of them."""

    task: Task
    split: str
    items: list[Item]
    rows: int  # of the split, in all groups
    bad_rows: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # truncated, fewer_shots, retokenized


@dataclass(frozen=True)
class Options:
    """How items are made.

    Attributes:
        limit: items of each group; None: all.
        chat: prompts are messages of a chat, for all tasks.
        too_long: of a prompt that the model can't see whole: an error, fewer shots, or cut off on the left, as the
            harness does.
        skip_bad_rows: leave out rows that can't be used, instead of an error.
    """

    limit: int | None = None
    chat: bool = False
    too_long: TooLong = "error"
    skip_bad_rows: bool = False


def prepare(task: Task, data: Path | None, tokenizer: Tokenizer, max_seq_len: int, options: Options) -> Prepared:
    """Read a task's rows and make its items.

    Raises:
        UserError: rows are not there or can't be used, or prompts are too long for the model.
    """
    split = task.source.split(data)
    made = Prepared(task, split, [], 0)
    maker = _Maker(made, tokenizer, max_seq_len, options)
    for group in task.groups:
        rows = task.source.rows(data, split, group)
        made.rows += len(rows)
        questions, problems = task.questions(rows)
        made.bad_rows += problems
        asked = [(i, row, q) for i, (row, q) in enumerate(zip(rows, questions, strict=True)) if q is not None]
        pool = _shots(task, data, group) if task.shots else []
        for (number, row, question), shots in zip(
            asked[: options.limit],
            shots_of(task, pool, task.shots, [q for *_, q in asked[: options.limit]]),
            strict=True,
        ):
            made.items.append(maker.item(group, number, row, question, shots))
    if made.bad_rows and not options.skip_bad_rows:
        shown = "; ".join(made.bad_rows[:SHOWN_ROWS]) + "; …" * (len(made.bad_rows) > SHOWN_ROWS)
        raise UserError(f"{task.name}: {len(made.bad_rows):,} of {made.rows:,} rows can't be used: {shown} "
                        "(--skip-bad-rows leaves them out)")  # fmt: skip
    if maker.too_long:
        (row, tokens), n = maker.too_long[0], len(maker.too_long)
        raise UserError(
            f"{task.name}: {n:,} of {len(made.items):,} prompts are longer than the {max_seq_len:,} tokens that the"
            f" model sees; the first, {row.where}, has {tokens:,} with {task.shots} shots. --shots takes fewer for all,"
            " --too-long fewer-shots fewer where needed, --too-long truncate cuts prompts off on the left"
        )
    if not made.items:
        raise UserError(f"{task.name}: the split {split} has no rows")
    return made


def _shots(task: Task, data: Path | None, group: str) -> list[Question]:
    questions, problems = task.questions(task.source.rows(data, task.shots_split, group))
    if problems:
        raise UserError(f"{task.name}: a shot can't be used: {problems[0]}")
    return [question for question in questions if question is not None]


class _Maker:
    def __init__(self, made: Prepared, tokenizer: Tokenizer, max_seq_len: int, options: Options) -> None:
        self.task, self.counts, self.tokenizer = made.task, made.counts, tokenizer
        self.max_seq_len, self.options = max_seq_len, options
        self.chat = made.task.chat or options.chat
        self.too_long: list[tuple[Row, int]] = []
        if self.chat and tokenizer.chat_template is None:
            raise UserError(f"{made.task.name}: the model has no chat template, it was not trained to chat")

    def item(self, group: str, number: int, row: Row, question: Question, shots: Sequence[Question]) -> Item:
        """Its length is allowed, or ``too_long`` has the row."""
        try:
            return self._fitting(group, number, row, question, shots)
        except UserError as error:
            raise UserError(f"{self.task.name}, {row.where}: {error}") from None

    def _fitting(self, group: str, number: int, row: Row, question: Question, shots: Sequence[Question]) -> Item:
        least = 0 if self.options.too_long == "fewer-shots" else len(shots)
        item, excess = self._item(group, number, row, question, shots)
        for n in range(len(shots) - 1, least - 1, -1):
            if excess <= 0:
                break
            item, excess = self._item(group, number, row, question, shots[:n])
        self.counts["fewer_shots"] += item.shots < len(shots)
        self.counts["retokenized"] += item.retokenized
        if excess > 0:
            if self.options.too_long != "truncate":
                self.too_long.append((row, excess + self.max_seq_len))
            else:
                item = self._truncated(item)
                self.counts["truncated"] += 1
        return item

    def _item(
        self, group: str, number: int, row: Row, question: Question, shots: Sequence[Question]
    ) -> tuple[Item, int]:
        """And how many tokens it is too long."""
        texts = tuple(self._context(group, shots, question, choice) for choice in range(len(question.prompts)))
        delimiter, how = "" if self.chat else self.task.delimiter, self.task.generation
        item = Item(self.task.name, group, number, question, texts, row, self._digest(texts, question, delimiter),
                    shots=len(shots))  # fmt: skip
        if how is not None:
            prompt = tuple(self._encode(texts[0]))
            return replace(item, prompt=prompt), len(prompt) + how.max_tokens - self.max_seq_len
        contexts = texts if len(texts) > 1 else texts * len(question.choices)
        encoded = {text: self._encode(text) for text in set(texts)}
        sequences, retokenized = [], 0
        for choice, context in zip(question.choices, contexts, strict=True):
            sequence, moved = encode_pair(self._encode, context, encoded[context], delimiter + choice)
            sequences.append(sequence)
            retokenized += moved
        if len(texts) == 1 and len({(*s.tokens[s.start :],) for s in sequences}) < len(set(question.choices)):
            raise UserError("the tokenizer encodes two different choices to the same tokens")
        excess = max(len(s.tokens) - 1 for s in sequences) - self.max_seq_len
        return replace(item, sequences=tuple(sequences), retokenized=retokenized), excess

    def _digest(self, contexts: Sequence[str], question: Question, delimiter: str) -> str:
        how = self.task.generation
        asked = [contexts, question.choices, question.gold, delimiter, None if how is None else asdict(how)]
        text = json.dumps([*asked, self.options.too_long]).encode(errors="surrogatepass")
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    def _context(self, group: str, shots: Sequence[Question], question: Question, choice: int) -> str:
        if not self.chat:
            return prompt_text(self.task, group, shots, question, choice)
        template = self.tokenizer.chat_template
        assert template is not None
        description = self.task.description(group)
        messages = [{"role": "system", "content": description}] if description else []
        for shot in shots:
            messages.append({"role": "user", "content": shot.prompt(shot.gold)})
            messages.append({"role": "assistant", "content": shot.choices[shot.gold]})
        return template.render([*messages, {"role": "user", "content": question.prompt(choice)}])

    def _encode(self, text: str) -> list[int]:
        """The tokens of a context; of an empty one the token that begins a text."""
        try:
            if self.chat:
                return self.tokenizer.encode_with_special(text)
            return self.tokenizer.encode(text) or [self.tokenizer.eos_id]
        except TypeError:  # a lone surrogate
            raise UserError(f"a text is not valid Unicode: {text[:40]!r}") from None

    def _truncated(self, item: Item) -> Item:
        if self.task.generation is not None:
            kept = self.max_seq_len - self.task.generation.max_tokens
            if kept < 1:
                longest = f"the answer alone may have {self.task.generation.max_tokens}"
                raise UserError(f"the model sees {self.max_seq_len} tokens, {longest}")
            return replace(item, prompt=item.prompt[-kept:])
        cut = []
        for tokens, start in item.sequences:
            off = max(len(tokens) - self.max_seq_len - 1, 0)
            if off >= start:
                raise UserError(f"a choice alone is longer than the model's {self.max_seq_len} tokens")
            cut.append(Scored(tokens[off:], start - off))
        return replace(item, sequences=tuple(cut))


def encode_pair(encode: Encode, context: str, before: list[int], continuation: str) -> tuple[Scored, bool]:
    """The tokens of ``context + continuation``, and those to score: all after the context's own.

    Spaces at the end of the context go with the continuation, as in the harness, because tokens begin with their space.
    The second value: whether the tokenizer joins the last of the context with the continuation, which changes tokens
    before the boundary; then the tokens from the first changed one on are scored.

    Args:
        encode: text to tokens.
        before: the tokens of ``context``; of an empty one a token that begins a text.
    """
    if not context:
        own = encode(continuation)
        added = len(before) if own[: len(before)] == before else 0  # a token that the tokenizer begins each text with
        return Scored(array("i", [*before, *own[added:]]), len(before)), False
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
        before = encode(context)
    whole = encode(context + continuation)
    start = len(before)
    moved = whole[:start] != before
    if moved:
        start = next(i for i, pair in enumerate(zip(whole, before, strict=False)) if pair[0] != pair[1])
    if start >= len(whole) or start < 1:
        raise UserError(f"the tokenizer leaves no token to score of {continuation!r} after {context[-40:]!r}")
    return Scored(array("i", whole), start), moved
