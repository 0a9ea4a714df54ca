"""Standard errors, intervals and paired comparisons of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def mean_stderr(values: Sequence[float]) -> float:
    """The standard error of a mean, from the sample's standard deviation; NaN of fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def pooled_stderr(groups: Sequence[Sequence[float]]) -> float:
    """Of the mean over all values of several groups, from the variance within groups, as the harness has it."""
    sizes = [len(group) for group in groups]
    within = sum((n - 1) * mean_stderr(group) ** 2 * n for n, group in zip(sizes, groups, strict=True) if n > 1)
    spare = sum(sizes) - len(sizes)
    return math.sqrt(within / spare / sum(sizes)) if spare else math.nan


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953): it stays within 0 and 1."""
    share, z2 = right / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return middle - half if right else 0.0, middle + half if right < n else 1.0


def around(mean: float, stderr: float) -> tuple[float, float]:
    """The 95 % interval of a mean that is normally distributed."""
    return mean - Z * stderr, mean + Z * stderr


def rates(metric: str, groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A metric's mean over all items, with standard error and interval."""
    values = [value for group in groups for value in group]
    stderr = pooled_stderr(groups) if len(groups) > 1 else mean_stderr(values)
    return {
        metric: fmean(values),
        f"{metric}_stderr": stderr,
        f"{metric}_interval": wilson(sum(values), len(values)),
    }


def macro(metric: str, groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The mean of the groups' means, each group with the same weight."""
    mean = fmean(fmean(group) for group in groups)
    stderr = math.sqrt(sum(mean_stderr(group) ** 2 for group in groups)) / len(groups)
    return {f"{metric}_macro": mean, f"{metric}_macro_stderr": stderr, f"{metric}_macro_interval": around(mean, stderr)}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Two models on the same items, each 0 or 1: the difference of the means, ours less theirs.

    The interval is that of the mean of the items' differences; ``p`` is of the exact test of McNemar (1947,
    doi:10.1007/BF02295996): how likely so unequal a split of the items that one alone has right is, of equal models.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, stderr = fmean(differences), mean_stderr(differences)
    won, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {
        "difference": mean, "stderr": stderr, "interval": around(mean, stderr), "n": len(differences),
        "won": won, "lost": lost, "p": _binomial_p(min(won, lost), won + lost),
    }  # fmt: skip


def _binomial_p(least: int, n: int) -> float:
    """Two-sided, of at most ``least`` of n fair coins."""
    log_half = -n * math.log(2)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half) for k in range(least + 1)
    )
    return min(1.0, 2 * tail)
