"""Supervised fine-tuning: what is learnt, the end of a turn, distillation, and data that can't be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastllm
from fastllm import run_dir
from fastllm.cli import main
from fastllm.data.loader import cu_seqlens_of
from fastllm.data.tokenizer import END_OF_TURN
from fastllm.posttraining.config import TeacherConfig
from fastllm.posttraining.examples import Examples, ExamplesBuilder
from fastllm.posttraining.rendering import Encoded, encode_chat, prepare_template
from fastllm.posttraining.run import EXAMPLES
from fastllm.posttraining.sft import CUT, ChatLoss, LearntChats

from . import small_tune

HELD_OUT = [i for i in range(100) if (i + i // 10) % 10 == 3]  # each color and each number once
TRAINED = [i for i in range(100) if i not in HELD_OUT]
OPTIONS = ("--train.batch-size", 4, "--optim.lr", 1e-2, "--optim.weight-decay", 0, *small_tune.ALWAYS)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> Path:
    """A run that has learnt to turn colors around."""
    folder = tmp_path_factory.mktemp("sft")
    data = small_tune.write_rows(folder / "chats.jsonl", small_tune.chats(TRAINED))
    held_out = small_tune.write_rows(folder / "held-out.jsonl", small_tune.chats(HELD_OUT))
    words = ("--data", data, "--data.eval-paths", held_out, *OPTIONS, "--train.epochs", 30)
    small_tune.tune("sft", base, *words, "--out", folder / "run")
    return folder / "run"


def answers(run: Path, numbers: Any) -> list[Any]:
    chats = [[small_tune.user(small_tune.question(i))] for i in numbers]
    return fastllm.Engine(*fastllm.load(run)).chat(chats, temperature=0, max_tokens=40)


def exact(run: Path, numbers: Any) -> float:
    found = zip(answers(run, numbers), numbers, strict=True)
    return float(np.mean([a.text == small_tune.answer(i) and a.finish_reason == "stop" for a, i in found]))


def test_questions_that_were_not_trained_on_are_answered(base, tuned):
    losses = small_tune.log(tuned, "validation_loss")
    assert losses[-1] < losses[0] / 10
    model, tokenizer = run_dir.load_run(base)
    prepare_template(tokenizer)
    chats = [[small_tune.user(small_tune.question(i))] for i in HELD_OUT]
    before = fastllm.Engine(model, tokenizer).chat(chats, temperature=0, max_tokens=40)
    assert not any(a.text == small_tune.answer(i) for a, i in zip(before, HELD_OUT, strict=True))
    assert exact(tuned, HELD_OUT) >= 0.9


def test_the_end_of_a_turn_is_learnt_and_ends_generation(tuned):
    """With the id in generation_config.json, which is read again."""
    model, tokenizer = run_dir.load_run(tuned)
    end = tokenizer.backend.token_to_id(END_OF_TURN)
    assert end in tokenizer.eos_ids
    assert json.loads((tuned / run_dir.GENERATION).read_text())["eos_token_id"] == list(tokenizer.eos_ids)
    examples = Examples.load(tuned / EXAMPLES, run_dir.load_metadata(tuned)["data"])
    for i in range(len(examples)):
        ids, trained = examples.sequence(i)
        assert ids[-1] == end
        assert trained[-1]
        assert trained[-2]
    assert all(a.finish_reason == "stop" for a in answers(tuned, HELD_OUT))


def examples_of(n: int) -> tuple[Examples, list[Encoded]]:
    tokenizer = small_tune.tokenizer()
    prepare_template(tokenizer)
    builder, parts = ExamplesBuilder(), []
    for chat in small_tune.chats(range(n)):
        parts += encode_chat(tokenizer, chat["messages"], max_tokens=128)
        builder.add(parts[-1:], 0)
    return builder.build(0.0), parts


def logits_of(model: torch.nn.Module, part: Encoded) -> tuple[Tensor, Tensor]:
    """Of the learnt tokens of a sequence alone: the logits, and the tokens."""
    ids, learnt = torch.from_numpy(part.ids).long(), torch.from_numpy(part.trained[1:])
    return model(ids[None, :-1])[0][learnt], ids[1:][learnt]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_is_the_mean_of_cross_entropy_and_divergence(dims, beta):
    student, teacher = small_tune.small_gpt(), small_tune.small_gpt(seed=3)
    config = TeacherConfig("teacher", weight=0.3, beta=beta, temperature=1.5)
    examples, parts = examples_of(3)
    sequences = LearntChats(examples, np.arange(3), 128, 0)
    batch = sequences.build(sequences.rows(np.arange(sequences.packing.sequences), 0))
    batch |= {"cu_seqlens": cu_seqlens_of(batch["positions"])}
    found = ChatLoss(dims, config, teacher)(student, batch)
    found.loss_sum.backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    expected = torch.zeros(())
    for part in parts:
        logits, targets = logits_of(student, part)
        with torch.no_grad():
            theirs, _ = logits_of(teacher, part)
        log_q, log_p = ((x / 1.5).log_softmax(-1) for x in (logits, theirs))
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        kl_p, kl_q = (F.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q))
        if beta == 0:
            divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        elif beta == 1:
            divergence = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
        else:
            divergence = beta * kl_p + (1 - beta) * kl_q
        expected = expected + 0.7 * F.cross_entropy(logits, targets, reduction="sum") + 0.3 * divergence
    torch.testing.assert_close(found.loss_sum, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_comes_nearer_to_its_teacher(base, tuned, tmp_path):
    data = small_tune.write_rows(tmp_path / "chats.jsonl", small_tune.chats(TRAINED))
    words = ("--data", data, *OPTIONS, "--train.epochs", 4, "--teacher.path", tuned, "--teacher.weight", 1)
    small_tune.tune("sft", base, *words, "--out", tmp_path / "run")
    divergence = small_tune.log(tmp_path / "run", "validation_divergence")
    assert divergence[-1] < divergence[0] / 2


def test_chats_that_can_not_be_used_are_named_and_counted(base, tmp_path):
    short = [small_tune.user("x"), small_tune.assistant("y")]
    rows = [
        *small_tune.chats(range(10)),
        {"messages": [small_tune.user("a"), small_tune.assistant("")]},
        {"messages": [small_tune.user("a"), {"role": "robot", "content": "b"}]},
        {"messages": [small_tune.user("a"), small_tune.user("b"), small_tune.assistant("c")]},
        {"messages": [small_tune.user("x" * 200), small_tune.assistant("c")]},
        {"messages": [*short, small_tune.user("x" * 200), small_tune.assistant("y")]},
        {"text": "no chat"},
    ]  # fmt: skip
    data = small_tune.write_rows(tmp_path / "chats.jsonl", rows)
    small_tune.tune("sft", base, "--data", data, *OPTIONS, "--train.steps", 1, "--out", tmp_path / "run")
    report = run_dir.load_metadata(tmp_path / "run")["report"]
    assert (report["read"], report["kept"]) == (16, 11)
    places = sorted(entry["first"][0].split(": ")[0] for entry in report["dropped"].values())
    assert places == [f"chats.jsonl:{line}" for line in (11, 12, 13, 14, 16)]
    assert report["notes"][CUT]["first"] == ["chats.jsonl:15"]


def test_a_template_that_drops_a_turn_leaves_nothing(base, tmp_path, capsys):
    template = tmp_path / "bad.jinja"
    template.write_text("{{ messages[-1].content }}<|im_end|>")
    data = small_tune.write_rows(tmp_path / "chats.jsonl", small_tune.chats(range(4)))
    words = ["sft", base, "--data", data, "--data.chat-template", template, "--out", tmp_path / "run"]
    assert main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert "nothing is left of" in error
    assert "dropped 4 of 4: 4 " in error
    assert "chats.jsonl:1" in error
    assert not (tmp_path / "run").exists()


def test_files_are_mixed_by_their_weights(base, tmp_path):
    small_tune.write_rows(tmp_path / "a.jsonl", small_tune.chats(range(50)))
    small_tune.write_rows(tmp_path / "b.jsonl", small_tune.chats(range(50, 60)))
    words = ("--data", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--data.weights", "a.jsonl=1", "b.jsonl=3")
    small_tune.tune("sft", base, *words, *OPTIONS, "--train.steps", 2, "--out", tmp_path / "run")
    assert small_tune.log(tmp_path / "run", "step")[-1] == 2


def test_a_tuned_model_is_exported_and_tuned_again(tuned, tmp_path):
    """As a Hugging Face folder, with its template and the tokens that end it."""
    fastllm.export(tuned, tmp_path / "hf")
    _, tokenizer = fastllm.load(tmp_path / "hf")
    ours = run_dir.load_run(tuned)[1]
    assert tokenizer.eos_ids == ours.eos_ids
    assert tokenizer.chat_template is not None
    assert ours.chat_template is not None
    assert tokenizer.chat_template.source == ours.chat_template.source
    assert exact(tmp_path / "hf", HELD_OUT) == exact(tuned, HELD_OUT)
