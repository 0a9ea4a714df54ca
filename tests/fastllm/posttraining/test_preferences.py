"""Preference optimization: the objective against plain log-probabilities, the reference, and what is learnt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastllm import run_dir
from fastllm.data.loader import cu_seqlens_of
from fastllm.errors import UserError
from fastllm.posttraining import preferences
from fastllm.posttraining.config import PreferenceConfig, TeacherConfig
from fastllm.posttraining.conversations import Pair
from fastllm.posttraining.examples import Examples, ExamplesBuilder
from fastllm.posttraining.losses import Answers, PreferenceOptions, kto_loss, pair_loss
from fastllm.posttraining.preferences import AnswerData, KtoObjective, PairObjective, Preferences, encode_pair
from fastllm.posttraining.rendering import Encoded, prepare_template
from fastllm.posttraining.sft import ChatLoss, LearntChats
from fastllm.training.plot import plot

from . import small_tune

OPTIONS = (
    "--train.batch-size", 8, "--train.micro-batch", 3, "--data.validation", 0.2, "--train.eval-every", 5,
    *small_tune.ALWAYS,
)  # fmt: skip


def encoded(n: int) -> tuple[Examples, list[list[Encoded]]]:
    """``n`` pairs of answers of different lengths."""
    tokenizer = small_tune.tokenizer()
    prepare_template(tokenizer)
    builder, rows = ExamplesBuilder(2), []
    for i in range(n):
        prompt = [small_tune.user(small_tune.question(i))]
        sides = ([small_tune.assistant(text)] for text in (small_tune.answer(i), "no" * (1 + i % 3)))
        rows.append(encode_pair(tokenizer, Pair(prompt, *sides, None, f"row {i}"), 128))
        builder.add(rows[-1], 0)
    return builder.build(0.0), rows


def plain_log_prob(model: torch.nn.Module, part: Encoded) -> Tensor:
    """Of the learnt tokens, by all logits of one sequence alone."""
    ids = torch.from_numpy(part.ids).long()
    log_probs = model(ids[None, :-1])[0].float().log_softmax(-1)
    picked = log_probs.gather(1, ids[1:, None])[:, 0]
    return picked[torch.from_numpy(part.trained[1:])].sum()


def batch_of(data: AnswerData, index: int, n: int) -> dict[str, Tensor]:
    batch = data.batch(index, n)
    return batch | {"cu_seqlens": cu_seqlens_of(batch["positions"])}


@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo", "cpo"])
def test_the_objective_is_the_loss_of_plain_log_probabilities(dims, method):
    model, reference = small_tune.small_gpt(), small_tune.small_gpt(seed=5)
    examples, rows = encoded(5)
    known = torch.stack([torch.stack([plain_log_prob(reference, side) for side in row]) for row in rows]).detach()
    needed = known.numpy() if method in ("dpo", "ipo") else None
    data = AnswerData(examples, np.arange(5), ordered=True, reference=needed)
    options = PreferenceOptions()
    found = PairObjective(dims, method, options)(model, batch_of(data, 0, 5))
    found.loss_sum.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    log_prob = torch.stack([torch.stack([plain_log_prob(model, side) for side in row]) for row in rows])
    lengths = torch.tensor([[int(side.trained.sum()) for side in row] for row in rows])
    answers = [Answers(log_prob[:, i], lengths[:, i], known[:, i] if needed is not None else None) for i in (0, 1)]
    expected = pair_loss(method, *answers, options)
    torch.testing.assert_close(found.loss_sum, expected.loss.sum(), rtol=1e-5, atol=1e-5)
    expected.loss.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=2e-5, msg=name)
    assert found.count == 5
    assert found.tokens == lengths.sum()
    torch.testing.assert_close(found.metrics["chosen_log_prob"], log_prob[:, 0].sum(), rtol=1e-5, atol=1e-4)
    margin = expected.chosen_reward - expected.rejected_reward
    torch.testing.assert_close(found.metrics["margin"], margin.sum(), rtol=1e-5, atol=1e-5)
    assert found.metrics["accuracy"] == (margin > 0).sum()


def test_padding_adds_nothing(dims):
    model, (examples, _) = small_tune.small_gpt(), encoded(3)
    for objective, data in (
        (PairObjective(dims, "dpo", PreferenceOptions()), {"reference": np.ones((3, 2), np.float32)}),
        (PairObjective(dims, "orpo", PreferenceOptions()), {}),
    ):
        batch = AnswerData(examples, np.arange(3), **data).padding()
        found = objective(model, batch | {"cu_seqlens": cu_seqlens_of(batch["positions"])})
        sums = found.sums(objective.metric_names, torch.float32)
        assert torch.equal(sums, torch.zeros_like(sums))
        found.loss_sum.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ktos_divergence_is_that_of_the_whole_step(dims, size):
    model, (pairs, _) = small_tune.small_gpt(), encoded(5)
    singles = np.arange(0, 10, 2)
    builder = ExamplesBuilder()
    for number in singles:
        builder.add([Encoded(*pairs.sequence(number))], 0)
    examples = builder.build(0.0)
    examples.extra = {"desirable": np.arange(5) % 2 == 0}
    reference = np.linspace(-90, -60, 10).astype(np.float32).reshape(5, 2)
    data = AnswerData(examples, np.arange(5), ordered=True, reference=reference, mismatched=True)
    objective = KtoObjective(dims, PreferenceOptions(), torch.device("cpu"))
    batches = [batch_of(data, first, min(size, 5 - first)) for first in range(0, 5, size)]
    objective.begin_step(model, 0, 0, batches)
    mixed = []
    for i in range(5):
        own, other = examples.sequence(i), examples.sequence((i + 3) % 5)
        ids = np.concatenate((own[0][~own[1]], other[0][other[1]]))
        mixed.append(plain_log_prob(model, Encoded(ids, np.arange(len(ids)) >= (~own[1]).sum())))
    kl = (torch.stack(mixed) - torch.from_numpy(reference[:, 1])).mean().clamp(min=0).detach()
    torch.testing.assert_close(objective.kl, kl, rtol=1e-5, atol=1e-4)
    log_prob = torch.stack([plain_log_prob(model, Encoded(*examples.sequence(i))) for i in range(5)])
    expected = kto_loss(log_prob, torch.from_numpy(reference[:, 0]), torch.arange(5) % 2 == 0, kl, PreferenceOptions())
    found = sum(objective(model, batch).loss_sum for batch in batches)
    torch.testing.assert_close(found, expected.loss.sum(), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return small_tune.write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", small_tune.pairs(range(60)))


@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo", "cpo", "kto"])
def test_preferences_of_pairs_that_were_not_seen_are_learnt(method, base, pairs, tmp_path):
    """Small letters are preferred to capitals."""
    run = tmp_path / "run"
    words = ("--method", method, "--data", pairs, *OPTIONS, "--train.steps", 15, "--train.epochs", 9)
    small_tune.tune("align", base, *words, "--optim.lr", 3e-3, "--out", run)
    if method == "kto":
        rewards = [small_tune.log(run, f"validation_{side}_reward")[-1] for side in ("chosen", "rejected")]
        assert rewards[0] > rewards[1] + 0.5
    else:
        assert small_tune.log(run, "validation_accuracy")[-1] == 1.0
        margins = small_tune.log(run, "validation_margin")
        assert margins[-1] > margins[0] + 0.3
    losses = small_tune.log(run, "validation_loss")
    assert losses[-1] < losses[0]
    if method == "dpo":
        plot(run / "log.jsonl", run / "loss.png", Preferences.panels)
        assert (run / "loss.png").stat().st_size > 1000
    assert run_dir.load_metadata(run)["method"] == method


def test_the_reference_is_computed_once(base, pairs, tmp_path, monkeypatch):
    """A resumed run reads it; one of other weights or data would compute its own."""
    run = tmp_path / "run"
    words = ("--method", "dpo", "--data", pairs, *OPTIONS, "--train.steps", 2, "--optim.lr", 1e-3)
    small_tune.tune("align", base, *words, "--out", run)
    identity = {"examples": run_dir.load_metadata(run)["data"], "base": run_dir.load_metadata(run)["base_weights"]}
    known = preferences.read_reference(run / preferences.REFERENCE, identity)
    assert known is not None
    assert known.shape == (60, 2)
    assert preferences.read_reference(run / preferences.REFERENCE, identity | {"base": "0"}) is None

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(preferences, "micro_batches", never)
    copy = shutil.copytree(run, tmp_path / "copy")
    small_tune.tune("align", "--resume", copy, "--train.steps", 3)
    assert small_tune.log(copy, "step")[-1] == 3


def test_answers_that_become_less_likely_are_warned_of(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 0, "validation_chosen_log_prob": -10.0}\n{"step": 9, "validation_chosen_log_prob": -14.0}\n'
    )
    (warning,) = Preferences().warnings(log)
    assert "fell from -10.0 to -14.0 nats" in warning
    log.write_text(
        '{"step": 0, "validation_chosen_log_prob": -10.0}\n{"step": 9, "validation_chosen_log_prob": -9.0}\n'
    )
    assert Preferences().warnings(log) == []
    log.write_text("".join(f'{{"step": {i}, "chosen_log_prob": {-10.0 - i}}}\n' for i in range(10)))
    assert len(Preferences().warnings(log)) == 1


def test_adapters_have_the_same_first_loss(base, pairs, tmp_path):
    """Before its first step a model with adapters is its reference."""
    run = tmp_path / "run"
    words = ("--method", "dpo", "--data", pairs, *OPTIONS, "--train.steps", 1, "--lora.rank", 4)
    small_tune.tune("align", base, *words, "--out", run)
    assert small_tune.log(run, "loss") == [pytest.approx(np.log(2), abs=1e-6)]
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def test_a_step_takes_little_more_memory_than_one_of_tuning(dims):
    """Of the same tokens: the logits of neither are held."""
    model, (examples, _) = small_tune.small_gpt(vocab_size=8192), encoded(40)
    total = int((examples.lengths - 1).sum())
    chats = LearntChats(examples, np.arange(80), total, 0)
    tuned = chats.build(chats.rows(np.arange(1), 0))
    tuned |= {"cu_seqlens": cu_seqlens_of(tuned["positions"])}
    data = AnswerData(examples, np.arange(40), ordered=True, reference=np.zeros((40, 2), np.float32))
    sft = most_memory(lambda: ChatLoss(dims, TeacherConfig())(model, tuned).loss_sum.backward())
    dpo = most_memory(
        lambda: PairObjective(dims, "dpo", PreferenceOptions())(model, batch_of(data, 0, 40)).loss_sum.backward()
    )
    assert dpo < 1.3 * sft
    logits = total * 8192 * 4
    assert dpo < logits  # of all tokens; far less where the vocabulary is large


def most_memory(call: Any) -> int:
    """Bytes of tensors at the peak of a call, beyond those before it."""
    call()  # the gradients stay
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    now = most = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_an_option_of_another_method_is_refused():
    config = PreferenceConfig()
    with pytest.raises(UserError, match=r"dpo has no preferences\.simpo_gamma"):
        PreferenceOptions(simpo_gamma=2.0).check_method("dpo")
    assert config.optim.lr == 1e-6
