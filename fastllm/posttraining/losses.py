"""The losses of preference optimization and of reinforcement learning, as functions of log-probabilities.

Every loss here is of one item: a pair, an answer, or a token. So those of micro-batches and ranks of unequal size add
up. Log-probabilities are in nats; for finite ones neither a result nor its gradient is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check

Method = Literal["dpo", "ipo", "kto", "orpo", "simpo", "cpo"]

USUAL_BETA: dict[Method, float] = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0, "cpo": 0.1}
# The options that each method has beside beta.
OPTIONS: dict[Method, tuple[str, ...]] = {
    "dpo": ("label_smoothing",),
    "ipo": (),
    "kto": ("desirable_weight", "undesirable_weight"),
    "orpo": ("sft_weight",),
    "simpo": ("label_smoothing", "simpo_gamma"),
    "cpo": ("label_smoothing", "sft_weight"),
}
MAX_LOG_RATIO = 20.0  # of two probabilities of a token; exp(20) is 5e8, far beyond any clipping
LOG_HALF = -math.log(2)


@dataclass(frozen=True)
class PreferenceOptions:
    """The loss of preference optimization."""

    beta: float = 0.0  # how much log-probabilities count; 0: the method's usual, 2 for simpo and 0.1 for the others
    label_smoothing: float = 0.0  # share of the pairs whose answers are taken to be swapped (dpo, simpo, cpo)
    simpo_gamma: float = 1.0  # the margin by which a chosen answer's reward should be higher (simpo)
    sft_weight: float = 1.0  # of the cross-entropy of the chosen answers (orpo, cpo)
    desirable_weight: float = 1.0  # of the losses of desirable answers (kto)
    undesirable_weight: float = 1.0  # of the losses of undesirable answers (kto)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            check(
                value >= 0 and math.isfinite(value),
                f"preferences.{field.name} must be finite and not negative, it is {value}",
            )
        check(
            self.label_smoothing < 0.5, f"preferences.label_smoothing must be below 0.5, it is {self.label_smoothing}"
        )

    def beta_of(self, method: Method) -> float:
        """``beta``, or the usual one of ``method``."""
        return self.beta or USUAL_BETA[method]

    def check_method(self, method: Method) -> None:
        """UserError where an option is set that ``method`` does not have."""
        for field in fields(self):
            used = field.name == "beta" or field.name in OPTIONS[method]
            check(used or getattr(self, field.name) == field.default, f"{method} has no preferences.{field.name}")


def needs_reference(method: Method) -> bool:
    """Whether the loss depends on the log-probabilities of the model that training began with."""
    return method in ("dpo", "ipo", "kto")


class Answers(NamedTuple):
    """The chosen answers of pairs, or the rejected ones.

    Attributes:
        log_prob: the sum over an answer's tokens, ``[pairs]``.
        length: its tokens, ``[pairs]``. One of 0 tokens counts as 1: padding, whose loss is finite.
        reference: ``log_prob`` by the reference model, ``[pairs]``; None for a method that needs none.
    """

    log_prob: Tensor
    length: Tensor
    reference: Tensor | None = None

    @property
    def mean_log_prob(self) -> Tensor:
        """By token."""
        return self.log_prob / self._tokens

    @property
    def log_ratio(self) -> Tensor:
        """Of the policy's probability to the reference's."""
        assert self.reference is not None
        return self.log_prob - self.reference

    @property
    def mean_log_ratio(self) -> Tensor:
        """By token."""
        return self.log_ratio / self._tokens

    @property
    def _tokens(self) -> Tensor:
        return self.length.clamp(min=1).to(self.log_prob.dtype)


class PairLoss(NamedTuple):
    """The loss of each pair, and the rewards of its answers, which have no gradient: ``[pairs]`` each."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


class AnswerLoss(NamedTuple):
    """The loss of each answer, and its reward, which has no gradient: ``[answers]`` each."""

    loss: Tensor
    reward: Tensor


def pair_loss(method: Method, chosen: Answers, rejected: Answers, options: PreferenceOptions) -> PairLoss:
    """The loss of pairs of answers by any method but "kto"; ValueError for that.

    With the difference Δ of the chosen and the rejected answer's log-probability, summed over the tokens:

    - "dpo" (Rafailov et al. 2023, arXiv:2305.18290): −log σ(β·Δ), where Δ is less the reference's. With label smoothing
      it is unbiased for pairs swapped at that rate (robust DPO, Chowdhury et al. 2024, arXiv:2403.00409).
    - "cpo" (Xu et al. 2024, arXiv:2401.08417): −log σ(β·Δ), and the chosen answer's cross-entropy.

    Where it is the mean over the tokens of each answer:

    - "ipo" (Azar et al. 2023, arXiv:2310.12036): (Δ − 1/(2β))², where Δ is less the reference's.
    - "simpo" (Meng et al. 2024, arXiv:2405.14734): −log σ(β·Δ − γ).
    - "orpo" (Hong et al. 2024, arXiv:2403.07691): −β·log σ(log of the odds ratio), and the chosen answer's
      cross-entropy. The odds are p/(1 − p) with p the geometric mean of the tokens' probabilities.

    Label smoothing ε of "cpo" and "simpo" is conservative: (1 − ε) of the loss, and ε of that of the swapped pair.
    A cross-entropy is the mean over the answer's own tokens, times ``sft_weight``.

    A reward is β times the log-probability in the sense of Δ; of "ipo" the one of "dpo".
    """
    beta, smoothing = options.beta_of(method), options.label_smoothing
    if method in ("dpo", "ipo"):
        rewards = beta * chosen.log_ratio, beta * rejected.log_ratio
    elif method == "cpo":
        rewards = beta * chosen.log_prob, beta * rejected.log_prob
    elif method in ("simpo", "orpo"):
        rewards = beta * chosen.mean_log_prob, beta * rejected.mean_log_prob
    else:
        raise ValueError(f"{method} has no loss of pairs")
    margin = rewards[0] - rewards[1]
    if method == "dpo":
        swapped = smoothing * F.logsigmoid(-margin)
        loss = (swapped - (1 - smoothing) * F.logsigmoid(margin)) / (1 - 2 * smoothing)
    elif method == "ipo":
        loss = (chosen.mean_log_ratio - rejected.mean_log_ratio - 1 / (2 * beta)) ** 2
    elif method == "orpo":
        loss = -beta * F.logsigmoid(log_odds(chosen.mean_log_prob) - log_odds(rejected.mean_log_prob))
    else:
        margin = margin - options.simpo_gamma if method == "simpo" else margin
        loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    if method in ("orpo", "cpo"):
        loss = loss - options.sft_weight * chosen.mean_log_prob
    return PairLoss(loss, rewards[0].detach(), rewards[1].detach())


def kto_loss(
    log_prob: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor, options: PreferenceOptions
) -> AnswerLoss:
    """The loss of single answers, each desirable or not (KTO, Ethayarajh et al. 2024, arXiv:2402.01306).

    It is 1 − σ(β·(r − ``kl``)) of a desirable answer and 1 − σ(β·(``kl`` − r)) of another, times the weight of its
    kind; r is the log-ratio of policy and reference. Nothing is normalised by length. The reward is β·r.

    Args:
        log_prob: the sum over an answer's tokens, ``[answers]``.
        reference: the same by the reference model, ``[answers]``.
        desirable: bool, ``[answers]``.
        kl: how far the policy is from the reference, 0-d: the mean of r over answers to other prompts, 0 at least. It
            gets no gradient.
    """
    beta = options.beta_of("kto")
    ratio = log_prob - reference
    gain = torch.where(desirable, ratio - kl.detach(), kl.detach() - ratio)
    weight = torch.full_like(ratio, options.undesirable_weight).masked_fill(desirable, options.desirable_weight)
    return AnswerLoss(weight * torch.sigmoid(-beta * gain), beta * ratio.detach())


def log_odds(log_prob: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``log_prob = log(p)``.

    A p that rounding takes for 1, or above, counts as the largest below it that the dtype has, without a gradient.
    """
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    # Each branch sees only values that it is exact for: one that overflowed would make the gradient of both NaN.
    near_1, near_0 = log_prob.clamp(min=LOG_HALF), log_prob.clamp(max=LOG_HALF)
    log_rest = torch.where(log_prob > LOG_HALF, torch.log(-torch.expm1(near_1)), torch.log1p(-torch.exp(near_0)))
    return log_prob - log_rest


# ---- reinforcement learning ----


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped loss of PPO (Schulman et al. 2017, arXiv:1707.06347) of each token, and whether it was clipped.

    It is −min(r·A, clip(r, 1 − ``clip_low``, 1 + ``clip_high``)·A), where r is the ratio of the token's probability now
    to the one that it was sampled with. A clipped token has no gradient, nor has one with r above exp(20).

    Args:
        log_prob: of sampled tokens, of any shape.
        old_log_prob: the same by the policy that sampled them.
        advantage: A, of a shape that broadcasts to it.
    """
    ratio = (log_prob - old_log_prob.detach()).clamp(max=MAX_LOG_RATIO).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    clipped = ((ratio < 1 - clip_low) & (advantage < 0)) | ((ratio > 1 + clip_high) & (advantage > 0))
    return loss, clipped


def kl_estimate(log_prob: Tensor, reference: Tensor) -> Tensor:
    """An unbiased estimate of KL(policy | reference) from each token that the policy sampled; it is never negative.

    exp(d) − d − 1 with d = ``reference − log_prob`` (k3 of Schulman 2020, http://joschu.net/blog/kl-approx.html). A d
    above 20 counts as 20, without a gradient.
    """
    difference = (reference - log_prob).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def advantages(rewards: Tensor, groups: Tensor, scale: bool) -> Tensor:
    """How much better than its group each completion is (GRPO, Shao et al. 2024, arXiv:2402.03300), ``[completions]``.

    The reward less the group's mean; with ``scale`` divided by the group's sample standard deviation (that of n − 1)
    plus 1e-4. A completion whose reward is NaN gets 0 and counts in neither. Waits for the device.

    Args:
        rewards: ``[completions]``.
        groups: int64 ``[completions]``: those of one prompt have one number.
    """
    known = ~rewards.isnan()
    # In float64, where a group of equal rewards has exactly their mean.
    values = rewards.detach().double().masked_fill(~known, 0.0)
    names, group = groups.unique(return_inverse=True)
    zeros = values.new_zeros(len(names))
    count = zeros.index_add(0, group, known.double())
    mean = zeros.index_add(0, group, values) / count.clamp(min=1)
    centred = (values - mean[group]).masked_fill(~known, 0.0)
    if scale:
        variance = zeros.index_add(0, group, centred**2) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[group] + 1e-4)
    return centred.to(rewards.dtype)
