"""Chats in packed sequences: the loss of each as if it stood alone; files, weights and the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastllm.config import ModelConfig
from fastllm.data.loader import IGNORE_INDEX
from fastllm.errors import UserError
from fastllm.model.gpt import GPT
from fastllm.posttraining.config import ChatDataConfig, SftConfig, TeacherConfig, TuneLoopConfig
from fastllm.posttraining.datasets import finish, sources
from fastllm.posttraining.examples import Examples, ExamplesBuilder, joined, segment_sums
from fastllm.posttraining.rendering import Encoded
from fastllm.posttraining.rows import Report
from fastllm.posttraining.sft import ChatLoss, LearntChats, training_data
from fastllm.training.micro_batches import micro_batches

from .small_tune import small_gpt

SEQ_LEN = 48


def some_chats(count: int, seed: int = 0) -> list[Encoded]:
    """Of 3 to 40 tokens, in one to three answers; the first token is never learnt, the last one always."""
    numbers = np.random.default_rng(seed)
    found = []
    for length in numbers.integers(3, 41, count):
        trained = np.repeat(numbers.random(length // 6 + 1) < 0.5, 6)[:length]
        trained[0], trained[-1] = False, True
        found.append(Encoded(numbers.integers(0, 272, length).astype(np.int32), trained))
    return found


def examples_of(chats: Sequence[Encoded], sources: Sequence[int] | None = None, validation: float = 0.0) -> Examples:
    builder = ExamplesBuilder()
    for number, chat in enumerate(chats):
        builder.add([chat], sources[number] if sources else 0)
    return builder.build(validation)


def nll_alone(model: GPT, chat: Encoded) -> Tensor:
    """By a plain forward pass of the chat."""
    ids = torch.from_numpy(chat.ids).long()
    log_probs = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return -log_probs[torch.from_numpy(chat.trained[1:])].sum()


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_gpt()


def config_of(**options: Any) -> SftConfig:
    return SftConfig(
        data=ChatDataConfig(max_seq_len=SEQ_LEN, **options),
        train=TuneLoopConfig(seed=3),
        model=ModelConfig(max_seq_len=SEQ_LEN),
    )


# ---- packing ----


def test_the_loss_is_that_of_the_chats_alone(model, dims):
    """Chats in one sequence don't see each other, and what is not learnt does not count; gradients too."""
    chats = some_chats(40)
    examples = examples_of(chats)
    data = training_data(config_of(), examples)
    sequences = data.sources[0].packing.sequences
    assert sequences < 0.8 * len(chats)  # several in one
    objective, loss, count = ChatLoss(dims, TeacherConfig()), torch.zeros(()), 0
    for batch in micro_batches(data, 0, sequences, 4, dims):
        found = objective(model, batch)
        loss, count = loss + found.loss_sum, count + int(found.count)
    expected = torch.stack([nll_alone(model, chat) for chat in chats]).sum()
    assert count == sum(int(chat.trained.sum()) for chat in chats)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))
    for ours, other in zip(gradients, theirs, strict=True):
        assert (ours - other).norm() <= 1e-4 * other.norm()


def test_every_chat_once_in_an_epoch():
    chats = some_chats(60)
    data = training_data(config_of(), examples_of(chats))
    n = data.sources[0].packing.sequences
    for epoch in range(2):
        batch = data.batch(epoch * n, n)
        targets = batch["targets"].numpy()
        learnt = np.sort(targets[targets != IGNORE_INDEX])
        assert learnt.tolist() == sorted(t for chat in chats for t in chat.ids[chat.trained].tolist())
        assert (batch["positions"][:, 0] == 0).all() and int(batch["positions"].max()) < 40
        assert batch["learnt"].tolist() == np.flatnonzero(targets.flatten() != IGNORE_INDEX).tolist()
    assert not torch.equal(data.batch(0, n)["tokens"], data.batch(n, n)["tokens"])  # in another order


def test_inputs_targets_and_positions():
    chats = [Encoded(np.arange(10, 14, dtype=np.int32), np.array([False, True, False, True]))]
    chats.append(Encoded(np.array([7, 8, 9], np.int32), np.array([False, False, True])))
    sequences = LearntChats(examples_of(chats), np.arange(2), 8, 0)
    batch = sequences.build([[(0, 0, 3), (4, 0, 2)]])
    assert batch["tokens"].tolist() == [[10, 11, 12, 7, 8, 0, 0, 0]]
    assert batch["targets"].tolist() == [[11, -100, 13, -100, 9, -100, -100, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["learnt"].tolist() == [0, 2, 4]
    assert sequences.padding()["targets"].tolist() == [[-100] * 8]
    pair = joined([(c.ids, c.trained) for c in chats], 4)
    assert pair["tokens"].tolist() == [[10, 11, 12, 7, 8, 0, 0, 0]]
    assert pair["targets"].tolist() == batch["targets"].tolist()
    assert pair["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert pair["segments"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert segment_sums(torch.arange(8.0), pair["segments"], 2).tolist() == [3.0, 7.0]


# ---- weights ----


def test_weights_are_shares_of_the_sequences():
    """Also where a file is far smaller than its share: it is read over and over."""
    sources = [0] * 50 + [1] * 10
    chats = [chat._replace(ids=chat.ids % 100 + 100 * of) for chat, of in zip(some_chats(60), sources, strict=True)]
    examples = examples_of(chats, sources)
    data = training_data(config_of(paths=("a.jsonl", "b.jsonl"), weights=("a.jsonl=1", "b.jsonl=3")), examples)
    batch = data.batch(0, 1000)
    of_b = (batch["targets"] >= 100).any(1)
    assert ((batch["targets"] >= 0) & (batch["targets"] < 100)).any(1).logical_xor(of_b).all()
    assert of_b.float().mean().item() == pytest.approx(0.75, abs=0.005)
    alone = training_data(config_of(paths=("a.jsonl", "b.jsonl"), weights=("a.jsonl=0", "b.jsonl=3")), examples)
    assert (alone.batch(0, 20)["targets"] >= 100).any(1).all()


@pytest.mark.parametrize(
    ("paths", "weights", "message"),
    [
        (("x/a.jsonl", "y/a.jsonl"), ("a.jsonl=1",), "data.weights: two files have the same name; rename one"),
        (("a.jsonl", "b.jsonl"), ("a.jsonl=1", "c.jsonl=1"), "c.jsonl"),
        (("a.jsonl", "b.jsonl"), ("a.jsonl=1",), "b.jsonl"),
    ],
)
def test_weights_that_make_no_sense(paths, weights, message):
    """It is said before the files are read."""
    with pytest.raises(UserError, match=message):
        next(sources(ChatDataConfig(paths=paths, weights=weights)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ("a=1", "b=1")}, "data.weights: nothing of b is left to train on"),
        ({"eval_paths": ("c", "d")}, "c, d: nothing is left to evaluate on"),
    ],
)
def test_a_file_of_which_nothing_is_left(options, message, tmp_path):
    builder, report = ExamplesBuilder(), Report()
    for chat in some_chats(5):
        builder.add([chat], 0)
        report.keep()
    with pytest.raises(UserError) as error:
        finish(builder, report, ChatDataConfig(paths=("a", "b"), **options), tmp_path)
    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


# ---- the validation split ----


def held_out(chats: Sequence[Encoded], validation: float = 0.2) -> list[bytes]:
    examples = examples_of(chats, validation=validation)
    assert sorted(np.concatenate(examples.split).tolist()) == list(range(len(chats)))
    return sorted(examples.sequence(row)[0].tobytes() for row in examples.split.validation)


def test_the_split_depends_on_what_the_rows_say():
    chats = some_chats(50)
    expected = held_out(chats)
    assert len(expected) == 10
    assert held_out(chats[::-1]) == expected
    assert held_out(chats[25:] + chats[:25]) == expected
    assert held_out(chats, 0.0) == []
    assert len(held_out(chats, 0.001)) == 1
    assert len(held_out(chats, 0.999)) == 49


def test_rows_that_say_the_same_are_on_one_side():
    chats = some_chats(40)
    for many in range(0, 40, 5):  # of one that would be held out, too
        rows = [*chats, *[chats[many]] * 60]
        found = held_out(rows)
        assert len(found) <= 20
        assert found.count(chats[many].ids.tobytes()) == 0
    twice = held_out(chats * 2)
    assert len(twice) == 16 and twice[::2] == twice[1::2]
    assert held_out(chats[:1] * 9) == []
    assert held_out(chats[:1]) == []


def test_sequences_of_one_chat_are_on_one_side():
    builder, chats = ExamplesBuilder(), some_chats(60)
    for first in range(0, 60, 3):
        parts = chats[first : first + 3]
        for part in parts:
            builder.add([part], 0, of=parts)
    rows = builder.build(0.25).split.validation
    assert len(rows) == 15
    assert np.unique(rows // 3).tolist() == sorted((rows // 3)[::3].tolist())


def test_rows_for_evaluation_are_the_split():
    builder = ExamplesBuilder()
    for number, chat in enumerate(some_chats(10)):
        builder.add([chat], 0, evaluated=number in (2, 5))
    assert builder.build(0.5).split.validation.tolist() == [2, 5]


# ---- the file ----


def test_the_file(tmp_path):
    builder = ExamplesBuilder(2)
    chats = some_chats(8)
    for first in range(0, 8, 2):
        builder.add(chats[first : first + 2], first % 3)
    examples = builder.build(0.3)
    examples.extra = {"desirable": np.array([True, False, True, True])}
    examples.save(tmp_path / "e")
    again = Examples.load(tmp_path / "e", examples.checksum)
    assert again.checksum == examples.checksum and again.per_row == 2
    assert again.extra["desirable"].tolist() == [True, False, True, True]
    for number, chat in enumerate(chats):
        ids, trained = again.sequence(number)
        assert ids.tolist() == chat.ids.tolist() and trained.tolist() == chat.trained.tolist()
    changes = {"tokens": examples.tokens + 1, "trained": ~examples.trained, "extra": {"desirable": np.ones(4, bool)}}
    for name, value in changes.items():
        assert replace(examples, **{name: value}).checksum != examples.checksum, name


def test_damaged_files(tmp_path):
    examples, path = examples_of(some_chats(8)), tmp_path / "e"
    examples.save(path)
    content = path.read_bytes()
    for damaged in (b"", content[:50], content[:-1], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"can't read the examples .*/e: ") as error:
            Examples.load(path, examples.checksum)
        assert str(error.value).isprintable()
    flipped = bytearray(content)
    flipped[-9] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r"the examples .*/e are damaged: they are not what was written"):
        Examples.load(path, examples.checksum)
    path.unlink()
    with pytest.raises(UserError, match="can't read the examples"):
        Examples.load(path, examples.checksum)
