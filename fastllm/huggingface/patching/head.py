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
from .finding import Finding, class_forward, names_in, replaced_forward, same, stand_in, taken


def find_loss(name: str, module: nn.Module) -> Finding | None:
    forward, kind = class_forward(module), type(module).__name__
    if not isinstance(module, PreTrainedModel) or "labels" not in inspect.signature(forward).parameters:
        return None
    head = getattr(module, "lm_head", None)
    why_not = _why_not(module, head)
    if not why_not:
        softcap = float(getattr(module.config, "final_logit_softcapping", None) or 0.0)
        result = _agreed_output(module, head, softcap)
        if result is None:
            why_not = "its loss is not the cross-entropy of lm_head(hidden states), or of those softcapped"
    if why_not:
        return Finding("loss", name, kind, why_not)
    changes = (
        replaced_forward(module, causal_lm_forward(forward, softcap, result)),
        replaced_forward(head, head_forward),
    )
    return Finding("loss", name, kind, "linear_cross_entropy", changes)


def _why_not(module: PreTrainedModel, head: nn.Module | None) -> str | None:
    if "loss_function" not in names_in(class_forward(module)) or head is None:
        return "it has no lm_head with transformers' loss function"
    if not isinstance(head, nn.Linear) or class_forward(head) is not nn.Linear.forward:
        return f"its lm_head is a {type(head).__name__}, not a plain Linear"
    if any("experts" in m._modules for m in module.modules()):
        return "the loss of a mixture of experts may count how its router balances"
    return taken(module) or taken(head)


def head_forward(self: nn.Linear, hidden_states: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
    """Logits; with a target ``[batch, seq]`` the loss: in the head's own forward, where FSDP has its weight whole."""
    if target is None:
        return F.linear(hidden_states, self.weight, self.bias)
    return linear_cross_entropy(hidden_states, self.weight, target, bias=self.bias, **options)


def causal_lm_forward(original: Callable, softcap: float, result: type[ModelOutput]) -> Callable:
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
        plain = isinstance(keep, int) and keep == 0 and self.loss_function is ForCausalLMLoss
        fused = getattr(self.lm_head.forward, "__func__", None) is head_forward
        if labels is None or wanted or not (plain and fused):
            return original(self, **kwargs)
        decoder = getattr(self, self.base_model_prefix)
        outputs = decoder(**{k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")})
        ignore_index, target = kwargs.get("ignore_index", -100), kwargs.get("shift_labels")
        if target is None:
            target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden, items = outputs[0], kwargs.get("num_items_in_batch")
        loss = self.lm_head(
            hidden, target.to(hidden.device), ignore_index=ignore_index, softcap=softcap,
            reduction="mean" if items is None else "sum",
        )  # fmt: skip
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        return result(loss=loss, logits=None, **{name: getattr(outputs, name, None) for name in copied})

    return forward


@torch.no_grad()
def _agreed_output(module: PreTrainedModel, head: nn.Linear, softcap: float) -> type | None:
    """The class of the output, if the loss on made-up hidden states is the same with and without logits."""
    generator = torch.Generator().manual_seed(0)
    small = nn.Linear(8, head.out_features, bias=head.bias is not None)
    for p in small.parameters():
        p.data = 5 * torch.randn(p.shape, generator=generator)  # logits so large that a softcap counts
    small.forward = head_forward.__get__(small)
    parts = {"lm_head": small, module.base_model_prefix: _Hidden(torch.randn(2, 5, 8, generator=generator))}
    twin = stand_in(module, **parts)
    twin.training = True
    labels = torch.randint(head.out_features, (2, 5), generator=generator)
    labels[0, 3] = -100
    try:
        theirs = class_forward(module)(twin, input_ids=None, labels=labels)
        ours = causal_lm_forward(class_forward(module), softcap, type(theirs))(twin, input_ids=None, labels=labels)
        return type(theirs) if same(ours.loss, theirs.loss) else None
    except Exception:  # whatever a foreign forward raises on our stand-in: it is another structure
        return None


class _Hidden(nn.Module):
    """A decoder that always gives the same hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)
