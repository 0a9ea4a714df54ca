"""What the kernels are told beside the logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..library import Size


class Options(NamedTuple):
    """The logits are columns ``first_class`` and on of ``classes`` in all; ``scale`` multiplies capped logits
    (csrc/cross_entropy.h)."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    scale: float
    first_class: Size
    classes: Size


class Targets(NamedTuple):
    """The class of each row, ``[rows]`` int64; the weight of each class, ``[classes]`` float32, and their mean, which
    only label smoothing reads: without it 0, whatever the weights of classes that are no target."""

    target: Tensor
    class_weight: Tensor | None
    mean_weight: Tensor | None

    @classmethod
    def of(cls, target: Tensor, class_weight: Tensor | None, label_smoothing: float) -> Targets:
        """In the dtypes that the kernels read."""
        index = target.reshape(-1).long()
        if class_weight is None:
            return cls(index, None, None)
        class_weight = class_weight.float()
        return cls(index, class_weight, class_weight.mean() if label_smoothing else class_weight.new_zeros(()))


class Divergence(NamedTuple):
    """Which Jensen-Shannon divergence (csrc/jsd.h): beta, 1 - beta, neither of them 0 for want of digits, and 1 /
    temperature."""

    teacher_share: float
    student_share: float
    scale: float


class Upstream(NamedTuple):
    """The gradients of the loss, the log-sum-exp and the entropy of each row, float32; None counts 0. With the last
    one goes the entropy."""

    dloss: Tensor | None
    dlse: Tensor | None
    dentropy: Tensor | None = None
    entropy: Tensor | None = None
