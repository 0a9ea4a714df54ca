from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fastllm.errors import UserError
from fastllm.posttraining.losses import (
    OPTIONS,
    USUAL_BETA,
    Answers,
    Method,
    PreferenceOptions,
    advantages,
    kl_estimate,
    kto_loss,
    log_odds,
    needs_reference,
    pair_loss,
    policy_loss,
)

PAIR_METHODS = [method for method in get_args(Method) if method != "kto"]
DTYPES = (torch.float32, torch.float64)
LENGTHS = torch.tensor([5, 3, 7, 1]), torch.tensor([2, 6, 4, 7])


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for a few roundings of what float32 or float64 can hold."""
    tolerance = 200 * torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=tolerance)


def pairs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Answers, Answers]:
    """Four pairs of several lengths, with a reference that is near."""
    torch.manual_seed(seed)
    sides = []
    for length in LENGTHS:
        log_prob = -length * (0.2 + 2 * torch.rand(4, dtype=dtype))
        sides.append(Answers(leaf(log_prob), length, log_prob + torch.randn(4, dtype=dtype)))
    return sides[0], sides[1]


# ---- against trl ----


class Accelerator:
    device = torch.device("cpu")

    @staticmethod
    def gather(values: Any) -> Any:
        return values

    gather_for_metrics = gather

    @staticmethod
    def reduce(values: Tensor, reduction: str) -> Tensor:
        return values


def trainer(**attributes: Any) -> Any:
    """What stands for ``self`` in a method of a trl trainer."""
    return SimpleNamespace(
        accelerator=Accelerator(), aux_loss_enabled=False, model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, **attributes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trl() -> Any:
    """The trainers of trl."""
    pytest.importorskip("trl", reason="the losses are compared with those of trl, which is not installed")
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.utils import nanstd

    return SimpleNamespace(
        DPO=DPOTrainer, KTO=KTOTrainer, GRPO=GRPOTrainer, CPO=CPOTrainer, ORPO=ORPOTrainer, nanstd=nanstd
    )


def tokens_of(log_prob: Tensor, length: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens ``[answers, width]`` with these sums, and the mask ``[answers, 1 + width]``."""
    mask = torch.arange(width) < length[:, None]
    return mask * (log_prob / length)[:, None], torch.cat((torch.zeros(len(length), 1, dtype=torch.bool), mask), 1)


def forward(log_probs: Tensor) -> Any:
    """What trl's fused head returns."""
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("method", "loss_type", "smoothing"),
    [("dpo", "sigmoid", 0.0), ("dpo", "robust", 0.0), ("dpo", "robust", 0.2), ("ipo", "ipo", 0.0)],
)
def test_dpo_and_ipo_are_those_of_trl(trl, method, loss_type, smoothing, dtype):
    chosen, rejected = pairs(dtype)
    options = PreferenceOptions(beta=0.3, label_smoothing=smoothing)
    ours = pair_loss(method, chosen, rejected, options)
    ours.loss.mean().backward()

    theirs = [leaf(side.log_prob) for side in (chosen, rejected)]
    lengths = torch.cat(LENGTHS)
    log_probs, mask = tokens_of(torch.cat(theirs), lengths, 8)
    self = trainer(
        beta=0.3, label_smoothing=smoothing, loss_types=[loss_type], loss_weights=[1.0], ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones_like(mask).long(), "attention_mask": torch.ones_like(mask).long(),
        "completion_mask": mask.long(), "ref_chosen_logps": chosen.reference, "ref_rejected_logps": rejected.reference,
    }  # fmt: skip
    loss = trl.DPO._compute_loss(self, lambda **_: forward(log_probs), inputs, return_outputs=False)
    loss.backward()
    assert_equal(ours.loss.mean(), loss)
    for side, log_prob in zip((chosen, rejected), theirs, strict=True):
        assert_equal(side.log_prob.grad, log_prob.grad)
    for reward, name in ((ours.chosen_reward, "rewards/chosen"), (ours.rejected_reward, "rewards/rejected")):
        assert_equal(reward.mean(), torch.tensor(self._metrics["train"][name][0], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("method", ["cpo", "simpo"])
def test_cpo_and_simpo_are_those_of_trl(trl, method, smoothing, dtype):
    chosen, rejected = pairs(dtype)
    options = PreferenceOptions(beta=1.7, label_smoothing=smoothing, simpo_gamma=0.6, sft_weight=0.0)
    ours = pair_loss(method, chosen, rejected, options)
    ours.loss.mean().backward()

    theirs = [leaf(side.log_prob) for side in (chosen, rejected)]
    self = trainer(
        alpha=0.0, beta=1.7, label_smoothing=smoothing, simpo_gamma=0.6,
        loss_type="simpo" if method == "simpo" else "sigmoid",
    )  # fmt: skip
    scores = [x / n for x, n in zip(theirs, LENGTHS, strict=True)] if method == "simpo" else theirs
    loss, *rewards = trl.CPO.cpo_loss(self, *scores)
    loss.mean().backward()
    for mine, its in zip(ours, (loss, *rewards), strict=True):
        assert_equal(mine, its)
    for side, log_prob in zip((chosen, rejected), theirs, strict=True):
        assert_equal(side.log_prob.grad, log_prob.grad)


def test_orpo_is_that_of_trl(trl):
    """In float32, to which trl's loss rounds."""
    chosen, rejected = pairs(torch.float32)
    ours = pair_loss("orpo", chosen, rejected, PreferenceOptions(beta=0.4, sft_weight=0.0))
    ours.loss.mean().backward()
    theirs = [leaf(side.log_prob) for side in (chosen, rejected)]
    scores = [x / n for x, n in zip(theirs, LENGTHS, strict=True)]
    loss, *rewards = trl.ORPO.odds_ratio_loss(trainer(beta=0.4), *scores)[:3]
    (-loss).mean().backward()
    for mine, its in zip(ours, (-loss, *rewards), strict=True):
        assert_equal(mine, its)
    for side, log_prob in zip((chosen, rejected), theirs, strict=True):
        assert_equal(side.log_prob.grad, log_prob.grad)


@pytest.mark.parametrize("method", ["cpo", "simpo", "orpo"])
def test_the_whole_loss_is_that_of_trl_from_the_logits_on(trl, method):
    """trl's cross-entropy is a mean over the batch's chosen tokens, ORPO's includes the prompt's: the same where all
    chosen answers have one length, and the prompt is one token, which nothing predicts."""
    torch.manual_seed(1)
    vocabulary, length = 11, {"chosen": 4, "rejected": 6}
    ids = {side: torch.randint(vocabulary, (3, 1 + n)) for side, n in length.items()}
    table = leaf(torch.randn(3 * 2, 7, vocabulary))

    batch: dict[str, Tensor] = {}
    for side, tokens in ids.items():
        labels = tokens.clone()
        labels[:, 0] = -100
        batch |= {f"{side}_input_ids": tokens, f"{side}_attention_mask": torch.ones_like(tokens)}
        batch[f"{side}_labels"] = labels
    cls = trl.ORPO if method == "orpo" else trl.CPO
    self = trainer(
        beta=0.9, label_smoothing=0.1 if method != "orpo" else 0.0, simpo_gamma=0.6, alpha=0.0,
        cpo_alpha=0.7 if method == "cpo" else 0.0, loss_type="simpo" if method == "simpo" else "sigmoid",
        is_encoder_decoder=False, pad_token_id=0, padding_value=0, concatenated_inputs=cls.concatenated_inputs,
        get_batch_logps=cls.get_batch_logps,
    )  # fmt: skip
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(cls, name):
            setattr(self, name, getattr(cls, name).__get__(self))
    theirs, _ = cls.get_batch_loss_metrics(self, lambda *_, **__: SimpleNamespace(logits=table), batch)
    (expected,) = torch.autograd.grad(theirs, table)

    sides = []
    for log_probs, tokens in zip(table.log_softmax(-1).chunk(2), ids.values(), strict=True):
        of_answer = log_probs[:, : tokens.shape[1] - 1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
        sides.append(Answers(of_answer.sum(1), torch.full((3,), of_answer.shape[1])))
    weight = 0.7 if method == "cpo" else 1.0
    options = PreferenceOptions(beta=0.9, label_smoothing=self.label_smoothing, simpo_gamma=0.6, sft_weight=weight)
    ours = pair_loss(method, *sides, options).loss.mean()
    assert_equal(ours, theirs)
    assert_equal(torch.autograd.grad(ours, table)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1.0, -1.0])  # of the mismatched answers: with -1 their KL is clamped to 0
def test_kto_is_that_of_trl(trl, dtype, shift):
    answers, other = pairs(dtype)
    desirable = torch.tensor([True, False, False, True])
    policy_kl, reference_kl = other.reference + shift * torch.tensor([1.0, 2.0, 0.5, 3.0]), other.reference
    kl = (policy_kl - reference_kl).mean().clamp(min=0)
    options = PreferenceOptions(beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    ours = kto_loss(answers.log_prob, answers.reference, desirable, kl, options)
    ours.loss.mean().backward()

    log_prob = leaf(answers.log_prob)
    log_probs, mask = tokens_of(log_prob, LENGTHS[0], 8)
    self = trainer(
        beta=0.3, desirable_weight=1.3, undesirable_weight=0.8, loss_type="kto", calculate_KL=True,
        precompute_ref_logps=True, _compute_kl_logps=lambda model, batch: policy_kl,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones_like(mask).long(), "attention_mask": torch.ones_like(mask).long(),
        "completion_mask": mask.long(), "label": desirable, "ref_logps": answers.reference,
        "ref_KL_logps": reference_kl,
    }  # fmt: skip
    loss = trl.KTO._compute_loss(self, lambda **_: forward(log_probs), inputs, return_outputs=False)
    loss.backward()
    assert_equal(ours.loss.mean(), loss)
    assert_equal(answers.log_prob.grad, log_prob.grad)
    metrics = self._metrics["train"]
    assert_equal(ours.reward[desirable].mean(), torch.tensor(metrics["rewards/chosen"][0], dtype=dtype))
    assert_equal(ours.reward[~desirable].mean(), torch.tensor(metrics["rewards/rejected"][0], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_grpo_is_that_of_trl(trl, dtype, beta):
    """Its variant whose loss is the mean over all tokens, here without padding."""
    torch.manual_seed(0)
    shape = (6, 9)
    old = -2 * torch.rand(shape, dtype=dtype)
    reference = old + 0.3 * torch.randn(shape, dtype=dtype)
    now = leaf(old + 0.4 * torch.randn(shape, dtype=dtype))
    advantage = torch.randn(6, dtype=dtype)
    per_token, clipped = policy_loss(now, old, advantage[:, None], 0.2, 0.28)
    assert per_token.shape == clipped.shape == shape
    assert 0 < clipped.sum() < clipped.numel()
    ours = (per_token + beta * kl_estimate(now, reference)).mean()
    (gradient,) = torch.autograd.grad(ours, now)

    theirs = leaf(now)
    self = trainer(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), beta=beta, epsilon_low=0.2, epsilon_high=0.28,
        loss_type="bnpo", importance_sampling_level="token", top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (theirs, torch.zeros(shape), None),
    )  # fmt: skip
    ones = torch.ones(shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones, "completion_mask": ones,
        "advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": reference,
    }  # fmt: skip
    loss = trl.GRPO._compute_loss(self, None, inputs)
    assert_equal(ours, loss)
    assert_equal(gradient, torch.autograd.grad(loss, theirs)[0])
    rate = self._metrics["train"]["clip_ratio/region_mean"][0]
    assert clipped.double().mean().item() == pytest.approx(rate)


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_those_of_trl(trl, scale):
    """trl has them amid the method that generates: its lines are repeated here, with its own deviation."""
    rewards = torch.tensor([[1.0, 0.0, 0.25, math.nan], [3.0, 3.0, 3.0, 3.0], [0.5, math.nan, math.nan, math.nan]])
    theirs = rewards - rewards.nanmean(1, keepdim=True)
    if scale:
        theirs = theirs / (trl.nanstd(rewards, dim=1)[:, None] + 1e-4)
    groups = torch.tensor([7, 2, -5]).repeat_interleave(4)
    ours = advantages(rewards.flatten(), groups, scale)
    assert ours.dtype == torch.float32
    assert_equal(ours, theirs.nan_to_num(nan=0.0).flatten())


# ---- by hand ----


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_values_by_hand():
    chosen = Answers(torch.tensor([-2.0]), torch.tensor([4]), torch.tensor([-3.0]))
    rejected = Answers(torch.tensor([-6.0]), torch.tensor([2]), torch.tensor([-5.0]))
    odds = math.exp(-0.5) / (1 - math.exp(-0.5)), math.exp(-3) / (1 - math.exp(-3))
    expected = {
        "dpo": (-math.log(sigmoid(0.1 * 2)), 0.1, -0.1),
        "ipo": ((0.25 + 0.5 - 5) ** 2, 0.1, -0.1),
        "cpo": (-math.log(sigmoid(0.1 * 4)) + 0.5, -0.2, -0.6),
        "simpo": (-math.log(sigmoid(2 * 2.5 - 1)), -1.0, -6.0),
        "orpo": (-0.1 * math.log(sigmoid(math.log(odds[0] / odds[1]))) + 0.5, -0.05, -0.3),
    }
    assert list(expected) != PAIR_METHODS and set(expected) == set(PAIR_METHODS)
    for method, values in expected.items():
        found = pair_loss(method, chosen, rejected, PreferenceOptions())
        assert [x.item() for x in found] == pytest.approx(values, rel=1e-5), method
    found = pair_loss("dpo", chosen, rejected, PreferenceOptions(label_smoothing=0.25))
    by_hand = (-0.75 * math.log(sigmoid(0.2)) + 0.25 * math.log(sigmoid(-0.2))) / 0.5
    assert found.loss.item() == pytest.approx(by_hand, rel=1e-5)

    options = PreferenceOptions(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    desirable = torch.tensor([True, False])
    log_prob = torch.tensor([-2.0, -2.0], requires_grad=True)
    found = kto_loss(log_prob, torch.tensor([-3.0, -3.0]), desirable, torch.tensor(0.4), options)
    assert found.loss.tolist() == pytest.approx([2 * (1 - sigmoid(0.3)), 3 * (1 - sigmoid(-0.3))])
    assert found.reward.tolist() == [0.5, 0.5]
    assert found.loss.requires_grad and not found.reward.requires_grad


def test_policy_loss_by_hand():
    ratio = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0])
    log_prob = leaf(ratio.log())
    advantage = torch.tensor([2.0] * 3 + [-2.0] * 3)
    loss, clipped = policy_loss(log_prob, torch.zeros(6), advantage, 0.2, 0.3)
    assert loss.tolist() == pytest.approx([-1.0, -2.0, -2.6, 1.6, 2.0, 4.0])
    assert clipped.tolist() == [False, False, True, True, False, False]
    loss.sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([-1.0, -2.0, 0.0, 0.0, 2.0, 4.0])


def test_kl_estimate_by_hand():
    log_prob, reference = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -1.0, -2.0])
    assert kl_estimate(log_prob, reference).tolist() == pytest.approx([0.0, math.e - 2, 1 / math.e])
    near = kl_estimate(torch.tensor(-1.0), torch.tensor(-1.0 + 2**-12))
    assert near.item() == pytest.approx(2.0**-25, rel=0.01)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 10.0, 3.0, math.nan, 10.0, 0.1, 0.1, 0.1], dtype=torch.float32)
    groups = torch.tensor([0, 1, 0, 0, 2, 3, 3, 3])
    assert advantages(rewards, groups, False).tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    one = 1 / (math.sqrt(2) + 1e-4)
    assert advantages(rewards, groups, True).tolist() == pytest.approx([-one, 0, one, 0, 0, 0, 0, 0])
    nothing = torch.full((3,), math.nan)
    assert advantages(nothing, torch.zeros(3, dtype=torch.long), True).tolist() == [0.0] * 3
    assert advantages(nothing[:0], torch.zeros(0, dtype=torch.long), True).shape == (0,)


# ---- gradients and extremes ----


@pytest.mark.parametrize("method", PAIR_METHODS)
def test_gradients_of_pairs(method):
    chosen, rejected = pairs()
    options = PreferenceOptions(label_smoothing=0.1)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return pair_loss(method, chosen._replace(log_prob=a), rejected._replace(log_prob=b), options).loss

    assert torch.autograd.gradcheck(loss, (chosen.log_prob, rejected.log_prob))
    found = pair_loss(method, chosen, rejected, options)
    assert not found.chosen_reward.requires_grad and not found.rejected_reward.requires_grad


def test_gradients_of_answers_and_tokens():
    answers, other = pairs()
    desirable = torch.tensor([True, False, True, False])
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def kto(x: Tensor) -> Tensor:
        return kto_loss(x, answers.reference, desirable, kl, PreferenceOptions()).loss

    assert torch.autograd.gradcheck(kto, answers.log_prob)
    assert torch.autograd.grad(kto(answers.log_prob).sum(), kl, allow_unused=True) == (None,)
    old = answers.log_prob.detach() + torch.tensor([0.1, -0.1, 0.5, -0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantage, 0.2, 0.2)[0], answers.log_prob)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, old), answers.log_prob)


EXTREMES = torch.tensor([0.0, -1e-30, -1e-8, -1e-3, -math.log(2), -1.0, -100.0, -1e4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", PAIR_METHODS)
def test_extremes_of_pairs(method, dtype):
    values = torch.cartesian_prod(EXTREMES, EXTREMES, EXTREMES).to(dtype)
    a, b = leaf(values[:, 0]), leaf(values[:, 1])
    for length in (0, 1, 100):
        lengths = torch.full((len(values),), length)
        sides = Answers(a, lengths, values[:, 2]), Answers(b, lengths, values[:, 2].flip(0))
        found = pair_loss(method, *sides, PreferenceOptions(label_smoothing=0.1))
        gradients = torch.autograd.grad(found.loss.sum(), (a, b))
        for tensor in (*found, *gradients):
            assert tensor.isfinite().all() and tensor.dtype == dtype


def test_extremes_of_answers_and_tokens():
    values = torch.cartesian_prod(EXTREMES, EXTREMES, torch.tensor([-1.0, 0.0, 1.0]))
    x, other, advantage = leaf(values[:, 0]), values[:, 1], values[:, 2]
    losses = [
        kto_loss(x, other, advantage > 0, torch.tensor(0.0), PreferenceOptions()).loss,
        policy_loss(x, other, advantage, 0.2, 0.2)[0],
        kl_estimate(x, other),
    ]
    for loss in losses:
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()
    assert (losses[2] >= 0).all()


def test_log_odds_are_exact():
    eps = torch.finfo(torch.float32).eps
    log_prob = torch.tensor([-2 * eps, -1e-6, -1e-3, -0.6931, -0.6932, -2.0, -80.0, -1e4], requires_grad=True)
    exact = log_prob.detach().double()
    expected = exact - torch.log(-torch.expm1(exact))
    assert_equal(log_odds(log_prob), expected.float())
    log_odds(log_prob).sum().backward()
    assert_equal(log_prob.grad, (-1 / torch.expm1(exact)).float())  # d/dx (x - log(1 - exp(x))) = 1 / (1 - exp(x))
    certain = torch.tensor([0.0, 1e-3], requires_grad=True)  # rounding may give log-probabilities above 0
    assert log_odds(certain).tolist() == pytest.approx([-math.log(eps)] * 2, rel=1e-5)
    log_odds(certain).sum().backward()
    assert certain.grad.tolist() == [0.0, 0.0]


# ---- options ----


def test_methods():
    assert set(OPTIONS) == set(USUAL_BETA) == set(get_args(Method))
    assert [method for method in get_args(Method) if needs_reference(method)] == ["dpo", "ipo", "kto"]
    assert PreferenceOptions().beta_of("simpo") == 2.0
    assert PreferenceOptions(beta=0.5).beta_of("simpo") == 0.5
    with pytest.raises(ValueError, match="kto has no loss of pairs"):
        pair_loss("kto", *pairs(), PreferenceOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "preferences.beta must be finite and not negative, it is -0.1"),
        ({"simpo_gamma": math.inf}, "preferences.simpo_gamma must be finite and not negative, it is inf"),
        ({"sft_weight": math.nan}, "preferences.sft_weight must be finite and not negative, it is nan"),
        ({"label_smoothing": 0.5}, "preferences.label_smoothing must be below 0.5, it is 0.5"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError) as error:
        PreferenceOptions(**options)
    assert str(error.value) == message


def test_an_option_that_the_method_does_not_have():
    PreferenceOptions(beta=0.2, label_smoothing=0.1).check_method("dpo")
    with pytest.raises(UserError, match=r"ipo has no preferences\.label_smoothing"):
        PreferenceOptions(label_smoothing=0.1).check_method("ipo")
