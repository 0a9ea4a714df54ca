"""The head and its loss in one, for transformers' causal language models: logits only when somebody asks for them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, ModelOutput
from transformers.utils import can_return_tuple

from ...kernels import linear_cross_entropy
from .finding import Finding, class_forward, names_in, same, setting, settings_of, stand_in, why_different
from .swap import Step, hooked, plain, runs, step, swap, taken

SOFTCAP = "final_logit_softcapping"


def looks_like_loss(module: nn.Module) -> bool:
    forward = class_forward(module)
    return isinstance(module, PreTrainedModel) and "labels" in inspect.signature(forward).parameters


def find_loss(name: str, module: nn.Module, untried: str | None) -> Finding:
    kind, head = type(module).__name__, getattr(module, "lm_head", None)
    why_not = _why_not(module, head) or untried
    if not why_not:
        each = _agreed(module, head)
        if each is None:
            why_not = "its loss is not the cross-entropy of lm_head(hidden states), or of those softcapped"
            return Finding("loss", name, kind, why_not, disagrees=True)
    if why_not:
        return Finding("loss", name, kind, why_not)
    return Finding("loss", name, kind, "linear_cross_entropy", ((module, each), (head, step(head_forward))))


def _why_not(module: nn.Module, head: nn.Module | None) -> str | None:
    if "loss_function" not in names_in(class_forward(module)) or head is None:
        return "it has no lm_head with transformers' loss function"
    if not isinstance(head, nn.Linear) or class_forward(head) is not nn.Linear.forward:
        return f"its lm_head is a {type(head).__name__}, not a plain Linear"
    if not plain(head.weight) or not plain(head.bias):
        return f"the weight of its lm_head is a {type(head.weight).__name__}, which computes in its own way"
    if module._parameters:
        return "it has parameters beside those of its decoder and its lm_head"
    if any("experts" in m._modules for m in module.modules()):
        return "the loss of a mixture of experts may count how its router balances"
    return taken(module) or taken(head)


def head_forward(original: Callable) -> Callable:
    """Logits; with a target ``[batch, seq]`` the loss: in the head's own forward, where FSDP has its weight whole."""

    @functools.wraps(original)
    def forward(self: nn.Linear, hidden_states: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
        if target is None:
            return original(self, hidden_states)
        return linear_cross_entropy(hidden_states, self.weight, target, bias=self.bias, **options)

    return forward


def causal_lm_forward(
    original: Callable, *, softcapped: bool, settings: tuple[tuple[str, Any], ...], result: type[ModelOutput]
) -> Callable:
    """``original``, the forward of a causal language model's class, but that its loss does without the logits."""
    names = tuple(inspect.signature(original).parameters)[1:]
    copied = [f.name for f in dataclasses.fields(result) if f.name not in ("loss", "logits")]

    @can_return_tuple
    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> ModelOutput:
        kwargs |= zip(names, args, strict=False)
        labels = kwargs.get("labels")
        wanted = not self.training if skip_logits is None else not skip_logits
        keep = kwargs.get("logits_to_keep", 0)
        fused = labels is not None and not wanted and isinstance(keep, int) and keep == 0
        if not (fused and self.loss_function is ForCausalLMLoss and _head_is_plain(self.lm_head)):
            return original(self, **kwargs)
        if any(setting((self.config, self), name) != value for name, value in settings):
            return original(self, **kwargs)
        decoder = getattr(self, self.base_model_prefix)
        outputs = decoder(**{k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")})
        ignore_index, target = kwargs.get("ignore_index", -100), kwargs.get("shift_labels")
        if target is None:
            target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden, items = outputs[0], kwargs.get("num_items_in_batch")
        loss = self.lm_head(
            hidden, target.to(hidden.device), ignore_index=ignore_index,
            softcap=_softcap(self) if softcapped else 0.0, reduction="mean" if items is None else "sum",
        )  # fmt: skip
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        return result(loss=loss, logits=None, **{name: getattr(outputs, name, None) for name in copied})

    return forward


def _head_is_plain(head: nn.Module) -> bool:
    """Its logits are those of its weight and bias: no adapter, hook or quantized weight, before patch() or since."""
    return runs(head, head_forward) and not hooked(head) and plain(head.weight) and plain(head.bias)


def _softcap(module: PreTrainedModel) -> float:
    return float(getattr(module.config, SOFTCAP, None) or 0.0)


def _agreed(module: PreTrainedModel, head: nn.Linear) -> Step | None:
    """The new forward, if the loss on made-up hidden states is the same with and without logits."""
    original = class_forward(module)
    settings = tuple(each for each in settings_of(module, (module.config, module)) if each[0] != SOFTCAP)
    options = {"softcapped": SOFTCAP in names_in(original), "settings": settings}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(head.out_features, 8, generator=generator)
    bias = None if head.bias is None else torch.randn(head.out_features, generator=generator)
    hidden, labels = (
        torch.randn(2, 5, 8, generator=generator),
        torch.randint(head.out_features, (2, 5), generator=generator),
    )
    labels[0, 3] = -100
    made: dict[type, Step] = {}

    def trial(training: bool, dtype: torch.dtype, magnitude: float) -> bool:
        small = nn.Linear(8, head.out_features, bias=bias is not None, device="meta")
        small.weight = nn.Parameter(weight.to(dtype))
        small.bias = bias if bias is None else nn.Parameter(bias.to(dtype))
        swap(small, (step(head_forward),))
        parts = {"lm_head": small, module.base_model_prefix: _Hidden((magnitude * hidden).to(dtype))}
        twin = stand_in(module, **parts)
        nn.Module.train(twin, training)
        theirs = original(twin, input_ids=None, labels=labels)
        each = made[type(theirs)] = step(causal_lm_forward, result=type(theirs), **options)
        ours = each.make(original, **dict(each.options))(twin, input_ids=None, labels=labels, skip_logits=True)
        return ours.logits is None and same(ours.loss, theirs.loss)

    return None if why_different(module, trial) or len(made) != 1 else next(iter(made.values()))


class _Hidden(nn.Module):
    """A decoder that always gives the same hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)
