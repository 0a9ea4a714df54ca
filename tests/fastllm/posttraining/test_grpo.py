"""Reinforcement learning: rollouts, what is learnt from them, and rewards that fail."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from fastllm import run_dir
from fastllm.cli import main
from fastllm.distributed.mesh import ParallelDims
from fastllm.posttraining import grpo
from fastllm.posttraining.config import GrpoConfig, RewardConfig, TuneLoopConfig
from fastllm.posttraining.examples import ExamplesBuilder
from fastllm.posttraining.grpo import COMPLETIONS, PolicyObjective
from fastllm.posttraining.rendering import TOO_LONG, Encoded
from fastllm.posttraining.rollouts import Completed
from fastllm.training.objectives import means

from . import small_tune

REWARDS = """
import time

def vowels(completion):
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))

def short(completion):
    return -len(completion) / 10

def same(completion):
    return 1.0

def bad(prompt, completion, kind):
    if kind == "raises":
        raise ValueError("no such answer")
    if kind == "hangs":
        time.sleep(60)
    return float("nan") if kind == "nan" else float(len(completion) % 3)
"""
OPTIONS = (
    "--method", "grpo", "--train.batch-size", 4, "--train.micro-batch", 8, "--grpo.group", 4, "--grpo.max-tokens", 8,
    "--data.validation", 0.1, "--train.epochs", 99, *small_tune.ALWAYS,
)  # fmt: skip


# ---- the objective, by hand ----

TEMPERATURE = 0.7


def objective_of(dims: ParallelDims, reference: torch.nn.Module | None, **options: Any) -> PolicyObjective:
    """Of three prompts; with nothing that samples."""
    builder = ExamplesBuilder()
    for length in (9, 4, 14):
        ids = np.random.default_rng(length).integers(0, 272, length).astype(np.int32)
        builder.add([Encoded(ids, np.zeros(length, bool))], 0)
    config = RewardConfig(
        grpo=GrpoConfig(group=4, max_tokens=12, temperature=TEMPERATURE, **options), train=TuneLoopConfig(micro_batch=3)
    )
    context: Any = SimpleNamespace(config=config, dims=dims, device=torch.device("cpu"), folder=Path())
    sampler: Any = SimpleNamespace(prompts=builder.build(0.0))
    return PolicyObjective(context, sampler, cast(Any, None), reference)


def some_completions(model: torch.nn.Module, objective: PolicyObjective, spread: float) -> list[Completed]:
    """Four of each prompt: one group with equal rewards, one with a reward that failed; two are cut off.

    ``spread``: of the old log-probabilities and the reference's around the model's.
    """
    numbers, found = np.random.default_rng(0), []
    rewards = [1.0, 0.0, None, 0.25, 0.5, 0.5, 0.5, 0.5, 2.0, -1.0, 0.0, 1.0]
    for number, reward in enumerate(rewards):
        tokens = numbers.integers(0, 272, 2 + number % 5).tolist()
        c = Completed(number // 4, "", tokens, [], truncated=number in (3, 9), reward=reward)
        with torch.no_grad():
            log_prob, c.log_probs = (plain(model, objective, c, t).tolist() for t in (TEMPERATURE, 1.0))
        c.old, c.reference = ((np.array(log_prob) + spread * numbers.normal(size=len(tokens))).tolist() for _ in "ab")
        found.append(c)
    return found


def plain(model: torch.nn.Module, objective: PolicyObjective, c: Completed, temperature: float) -> Tensor:
    """The log-probabilities of a completion's tokens, by all logits of its sequence alone."""
    prompt = torch.from_numpy(objective.sampler.prompts.sequence(c.row)[0]).long()
    ids = torch.cat((prompt, torch.tensor(c.tokens)))
    logits = model(ids[None, :-1])[0][len(prompt) - 1 :] / temperature
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]


def loss_by_hand(model: torch.nn.Module, objective: PolicyObjective, found: list[Completed]) -> tuple[Tensor, int]:
    """The loss, and what it is divided by."""
    options, loss, count = objective.options, torch.zeros(()), 0
    high = options.clip_high or (0.28 if options.variant == "dapo" else options.clip_low)
    for number, c in enumerate(found):
        if c.reward is None or (c.truncated and not options.train_truncated):
            continue
        group = [o.reward for o in found[number // 4 * 4 :][:4] if o.reward is not None]
        gain = c.reward - np.mean(group)
        if options.variant != "dr_grpo":
            gain /= np.std(group, ddof=1) + 1e-4
        log_prob = plain(model, objective, c, TEMPERATURE)
        old = log_prob.detach() if options.updates == 1 else torch.tensor(c.old)
        ratio = (log_prob - old).exp()
        of_token = -torch.minimum(ratio * gain, ratio.clamp(1 - options.clip_low, 1 + high) * gain)
        if objective.reference is not None:
            apart = torch.tensor(c.reference) - log_prob
            of_token = of_token + options.kl * (apart.exp() - apart - 1)
        n = len(c.tokens)
        loss = loss + of_token.sum() * {"grpo": 1 / n, "dr_grpo": 1 / 12, "dapo": 1.0}[options.variant]
        count += n if options.variant == "dapo" else 1
    return loss, count


OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"variant": "dr_grpo"},
    "dapo": {"variant": "dapo"},
    "later updates": {"updates": 2},
    "dapo, later updates": {"variant": "dapo", "updates": 2, "train_truncated": True},
    "another clip": {"updates": 2, "clip_low": 0.5, "clip_high": 0.1, "train_truncated": True},
    "kl": {"kl": 0.3},
    "kl, later updates": {"kl": 0.3, "updates": 2, "variant": "dr_grpo", "train_truncated": True},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_by_hand(name, dims):
    options, model = OBJECTIVES[name], small_tune.small_gpt()
    objective = objective_of(dims, model if "kl" in options else None, **options)
    found = some_completions(model, objective, 0.3)
    parts = [objective(model, batch) for batch in objective._batches(found)]
    loss = torch.stack([part.loss_sum for part in parts]).sum()
    expected, count = loss_by_hand(model, objective, found)
    assert sum(int(part.count) for part in parts) == count
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))
    for ours, other in zip(gradients, theirs, strict=True):
        assert (ours - other).norm() <= 1e-4 * other.norm() + 1e-6
    sums = torch.stack([part.sums(objective.metric_names, torch.float64) for part in parts]).sum(0)
    values = dict(zip(objective.metric_names, means(sums[3:]).tolist(), strict=True))
    known = [c.reward for c in found if c.reward is not None]
    assert values["reward"] == pytest.approx(np.mean(known)) and values["failed"] == pytest.approx(1 / 12)
    assert values["truncated"] == pytest.approx(2 / 12) and values["mismatch"] < 1e-5
    assert values["length"] == pytest.approx(np.mean([len(c.tokens) for c in found]))
    assert (values["clip_fraction"] > 0) == (options.get("updates", 1) > 1)


def test_log_probabilities_are_filled_in(dims):
    """Those before the first update, and the reference's, for a rollout of several micro-batches."""
    model, other = small_tune.small_gpt(), small_tune.small_gpt(seed=2)
    objective = objective_of(dims, other, kl=0.1, updates=2)
    found = some_completions(model, objective, 0.0)
    expected = [(c.old, plain(other, objective, c, TEMPERATURE).tolist()) for c in found]
    for c in found:
        c.old = c.reference = None
    objective._fill(model, found, "old")
    objective._fill(other, found, "reference")
    for c, (old, reference) in zip(found, expected, strict=True):
        assert c.old == pytest.approx(old, abs=1e-4) and c.reference == pytest.approx(reference, abs=1e-4)


# ---- runs ----


@pytest.fixture
def train(base, tmp_path):
    """``fastllm align --method grpo`` by a function of REWARDS; the run folder."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": small_tune.question(i), "kind": "fine"} for i in range(20)]
    data = small_tune.write_rows(tmp_path / "prompts.jsonl", rows)

    def run(reward: str, *words: object, data: Path = data) -> Path:
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        spec = f"{tmp_path / 'rewards.py'}:{reward}"
        small_tune.tune("align", base, *OPTIONS, "--data", data, "--grpo.reward", spec, *words, "--out", out)
        return out

    return run


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo"])
def test_the_reward_rises(train, variant):
    lr = 1e-3 if variant == "dr_grpo" else 3e-3
    run = train("vowels", "--grpo.variant", variant, "--optim.lr", lr, "--train.steps", 30, "--grpo.train-truncated")
    rewards = small_tune.log(run, "reward")
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3
    assert small_tune.log(run, "validation_reward")[-1] > small_tune.log(run, "validation_reward")[0] + 0.3
    assert small_tune.log(run, "entropy")[0] > small_tune.log(run, "entropy")[-1]


def test_a_model_learns_to_stop(train):
    """Only those that end within max-tokens are learnt from: at first hardly any does."""
    run = train("short", "--optim.lr", 3e-3, "--train.steps", 40, "--grpo.group", 16)
    assert np.mean(small_tune.log(run, "truncated")[:3]) > 0.8
    assert small_tune.log(run, "length")[-1] < small_tune.log(run, "length")[0] - 2


def test_the_engine_and_the_trainer_agree(train):
    """In float32 the log-probabilities of what was sampled differ by rounding alone, whatever the temperature."""
    run = train("vowels", "--train.steps", 2, "--grpo.temperature", 0.7, "--grpo.train-truncated", "--optim.lr", 1e-3)
    assert max(small_tune.log(run, "mismatch")) < 1e-4
    assert max(small_tune.log(run, "clip_fraction")) == 0  # each step learns from its own rollout


def test_later_updates_of_a_rollout_are_off_policy(train):
    """From the second one on, ratios are not 1, and the engine's log-probabilities are not the trainer's."""
    words = ("--train.steps", 6, "--grpo.updates", 3, "--grpo.train-truncated", "--optim.lr", 2e-2)
    run = train("vowels", *words, "--optim.warmup-ratio", 0)
    mismatch = small_tune.log(run, "mismatch")
    assert max(mismatch[0], mismatch[3]) < 1e-4 < min(mismatch[1], mismatch[2], mismatch[4])
    assert max(small_tune.log(run, "clip_fraction")) > 0
    rollouts = {json.loads(line)["rollout"] for line in (run / COMPLETIONS).read_text().splitlines()}
    assert rollouts == {0, 1}


def test_the_reference_holds_the_model_back(train):
    words = ("--train.steps", 12, "--grpo.train-truncated", "--optim.lr", 3e-3)
    free = train("vowels", *words, "--grpo.kl", 1e-6)
    held = train("vowels", *words, "--grpo.kl", 10.0)
    assert small_tune.log(held, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert small_tune.log(held, "kl")[-1] < small_tune.log(free, "kl")[-1] / 4


def test_equal_rewards_change_nothing(train, base):
    run = train("same", "--train.steps", 3, "--grpo.train-truncated", "--optim.lr", 1e-2)
    assert small_tune.log(run, "grad_norm") == [0.0] * 3
    assert small_tune.log(run, "reward") == [1.0] * 3


def test_dapo_replaces_prompts_whose_rewards_are_equal(train, tmp_path):
    """Three other prompts are tried for each, each time with other completions."""
    run = train("same", "--train.steps", 1, "--grpo.variant", "dapo", "--grpo.train-truncated")
    lines = [json.loads(line) for line in (run / COMPLETIONS).read_text().splitlines()]
    assert len(lines) == 16
    assert len({line["prompt"] for line in lines}) <= 4


@pytest.mark.parametrize(("kind", "problem"), [("raises", "ValueError: no such answer"), ("hangs", "longer than 1 s")])
def test_a_reward_that_fails_ends_its_sample_only(train, tmp_path, kind, problem):
    rows = [{"prompt": small_tune.question(i), "kind": kind if i == 3 else "fine"} for i in range(4)]
    data = small_tune.write_rows(tmp_path / "some.jsonl", rows)
    words = ("--data.validation", 0, "--grpo.reward-seconds", 1, "--grpo.group", 2, "--grpo.train-truncated")
    run = train("bad", *words, "--train.steps", 1, data=data)
    lines = [json.loads(line) for line in (run / COMPLETIONS).read_text().splitlines()]
    failed = [line for line in lines if line["reward"] is None]
    assert len(failed) == 2
    assert all(problem in line["problem"] for line in failed)
    assert small_tune.log(run, "failed") == [0.25]


def test_a_reward_that_is_no_number_is_none(train, tmp_path):
    data = small_tune.write_rows(tmp_path / "nan.jsonl", [{"prompt": small_tune.question(0), "kind": "nan"}] * 2)
    run = train("bad", "--data.validation", 0, "--train.steps", 1, "--train.batch-size", 2, data=data)
    assert small_tune.log(run, "failed") == [1.0]
    assert small_tune.log(run, "grad_norm") == [0.0]


def test_prompts_that_leave_no_room_are_left_out(train, tmp_path):
    rows = [
        {"prompt": "x" * 120, "kind": "fine"},
        *({"prompt": small_tune.question(i), "kind": "fine"} for i in (0, 1)),
    ]
    data = small_tune.write_rows(tmp_path / "long.jsonl", rows)
    run = train("vowels", "--data.validation", 0, "--train.steps", 1, "--train.batch-size", 2, data=data)
    assert run_dir.load_metadata(run)["report"]["kept"] == 2
    dropped = run_dir.load_metadata(run)["report"]["dropped"]
    assert dropped == {TOO_LONG: {"count": 1, "first": ["long.jsonl:1: 139 tokens, and 8 of an answer"]}}


def test_a_wrong_reward_is_said_before_anything_is_made(base, tmp_path, capsys):
    data = small_tune.write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    words = ["align", base, *OPTIONS, "--data", data, "--grpo.reward", "no_such_module:f", "--out", tmp_path / "run"]
    assert main([*map(str, words)]) == 2
    assert "No module named 'no_such_module'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_completions_that_teach_nothing_are_not_computed(train, monkeypatch):
    """Of groups with equal rewards no token goes through the model, but they count."""
    sizes = []
    packed = grpo.PolicyObjective._packed
    monkeypatch.setattr(
        grpo.PolicyObjective, "_packed", lambda self, part: (sizes.append(len(part)), packed(self, part))[1]
    )
    run = train("same", "--train.steps", 2, "--grpo.train-truncated")
    assert sizes == [0, 0]
    assert torch.tensor(small_tune.log(run, "length")).min() > 0
