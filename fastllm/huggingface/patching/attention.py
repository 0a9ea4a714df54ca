"""Attention: ``flash_attention`` where a model asks transformers' registry for its attention.

The forward of a patched attention asks a registry of ours (see exchange.py), and that of the model around it makes its
masks in our form. Configurations stay as they are, so that a new model from the same one is not patched; and where
one comes to name another implementation than it did at patch(), that one is called.

Our mask is one of

- None: a query sees all keys up to its own (in its window);
- int32 ``[1, 1, 2, documents + 1]``: cu_seqlens of queries and of keys, for padding and for packed sequences;
- bool or floating ``[batch, 1 or heads, queries, keys]``: anything else (a static cache, masks made by the user or
  outside of the model, and under torch.compile, which can't look at values, any mask at all).

All have four dimensions, so that a model inside another one hands them on, as transformers does with finished masks.
The hidden states of padding itself are of no use, and not those of other implementations, but where a prompt padded on
the right is generated from.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _active_collector

from ...errors import UserError
from ...kernels import flash_attention, softmax
from .exchange import exchanged
from .finding import Finding, class_forward, names_in
from .swap import Step, patched_class, step, steps_of, swap, swap_back, taken, why_not_back

NAME = "fastllm"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    eager: Callable | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query ``[batch, heads, seq_q, head_dim]``, key, value ``[batch, kv_heads, seq_k, head_dim]`` to
    ``[batch, seq_q, heads, head_dim]``; the probabilities too where ``output_attentions`` asks for them, by the
    model's own ``eager`` if that was chosen."""
    if dropout:
        raise ValueError(f"fastllm's attention has no dropout, it is {dropout}: set the model's attention dropout to 0")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask = None  # from maskless_forward
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        causal = True  # only causal masks become packed sequences
    if attention_mask is not None and attention_mask.dim() == 2:  # as FlashAttention's, made outside of the model
        keys = attention_mask[:, None, None, -key.shape[2] :].bool()
        attention_mask = keys & _dense(None, *query.shape[:3:2], key.shape[2], causal, sliding_window, query.device)
    if query.dtype != value.dtype:  # under autocast rotary positions may have made float32 of queries and keys
        query, key = query.to(value.dtype), key.to(value.dtype)
    if kwargs.get("output_attentions") or _recorded(module):
        if eager is not None:
            options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
            given = {name: value for name, value in options.items() if value is not None}
            sizes = (query.shape[0], query.shape[2], key.shape[2], causal, sliding_window, query.device)
            mask = _dense(attention_mask, *sizes) if _in_short(attention_mask) else attention_mask
            return eager(module, query, key, value, _additive(mask, query.dtype), **given, **kwargs)
        return _explicit(query, key, value, attention_mask, scaling, softcap, s_aux, causal, sliding_window)
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        if softcap or s_aux is not None:
            out, _ = _explicit(query, key, value, attention_mask, scaling, softcap, s_aux, causal, sliding_window)
            return out, None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=False)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options = {"causal": causal, "scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    options["window"] = sliding_window if causal else None
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if attention_mask is not None:
        cu_q, cu_k = attention_mask[0, 0]
    if cu_q is None:
        return flash_attention(q, k, v, **options), None
    longest = {"max_seqlen_q": q.shape[1], "max_seqlen_k": k.shape[1]}  # no document is longer than a row
    packed = (t.flatten(0, 1) for t in (q, k, v))
    out = flash_attention(*packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **longest, **options)
    return out.unflatten(0, q.shape[:2]), None


def _recorded(module: nn.Module) -> bool:
    """Whether somebody asked the model for probabilities, and it says so by its configuration or hooks alone."""
    if getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    recorded = _active_collector.get()
    return recorded is not None and any(key.endswith("attentions") for key in recorded)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention by its probabilities ``[batch, heads, seq_q, seq_k]``, for the masks and callers that need them."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if _in_short(mask):
        mask = _dense(mask, query.shape[0], query.shape[2], key.shape[2], causal, window, query.device)
    if sinks is None:
        probabilities = softmax(scores, mask=mask)
    else:  # a key without a value
        column = sinks.view(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:3], 1)
        seen = F.pad(mask.expand(-1, scores.shape[1], -1, -1), (0, 1), value=mask.dtype == torch.bool)
        probabilities = softmax(torch.cat([scores, column], -1), mask=seen)[..., :-1]
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def _in_short(mask: Tensor | None) -> bool:
    return mask is None or mask.dtype == torch.int32


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _dense(
    documents: Tensor | None, batch: int, seq_q: int, seq_k: int, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Bool ``[batch, 1, seq_q, seq_k]``: what None or documents mean."""
    q = torch.arange(seq_q, device=device).view(1, -1, 1) + (seq_k - seq_q)
    k = torch.arange(seq_k, device=device).view(1, 1, -1)
    seen = (k <= q) if causal else torch.ones_like(k <= q)
    if causal and window:
        seen = seen & (k > q - window)
    if documents is not None:
        of_q, of_k = (_document(cu, batch, seq) for cu, seq in zip(documents[0, 0], (seq_q, seq_k), strict=True))
        seen = seen & (of_q.unsqueeze(-1) == of_k.unsqueeze(1))
    return seen.expand(batch, -1, -1).unsqueeze(1)


def _document(cu_seqlens: Tensor, batch: int, seq: int) -> Tensor:
    """``[batch, seq]``: the document of each token."""
    tokens = torch.arange(batch * seq, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).view(batch, seq)


# ---- masks ----


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask (see the module's docstring) that transformers describes; ``attention_mask`` ``[batch, keys]`` bool."""
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)

    def dense(**more: Any) -> Tensor | None:
        return sdpa_mask(*sizes, allow_is_causal_skip=False, **more, **kwargs)

    if kwargs.pop("allow_is_bidirectional_skip", False):
        return dense(allow_is_bidirectional_skip=True)
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if not aligned or kwargs.get("use_vmap"):
        return dense()
    if torch.compiler.is_compiling():
        return None if attention_mask is None and allow_is_causal_skip else dense()
    if attention_mask is None:
        return None if allow_is_causal_skip else _packed(mask_function, batch_size, q_length, kv_length, dense, kwargs)
    seen = F.pad(attention_mask, (0, kv_offset + kv_length - attention_mask.shape[1]))[:, kv_offset:]
    return dense() if not allow_is_causal_skip else _padded(seen, q_length, dense)


def _padded(seen: Tensor, q_length: int, dense: Callable[[], Tensor]) -> Tensor | None:
    """``seen`` bool ``[batch, keys]``: which of them are text."""
    if seen.all():
        return None
    begins = F.pad(seen[:, 1:] != seen[:, :-1], (1, 0), value=True)
    if ((begins & seen).sum(1) > 1).any():
        return dense()  # text on both sides of padding
    if q_length == seen.shape[1] and seen[:, 0].all():
        return None  # padding on the right is in the future of all text
    return _documents(begins, q_length, ~seen)


def _packed(
    mask_function: Callable, batch: int, q_length: int, kv_length: int, dense: Callable[[], Tensor], kwargs: Any
) -> Tensor | None:
    """Sequences packed one after another, from what neighbours see of each other."""
    if q_length != kv_length:
        return dense()
    at = torch.arange(q_length, device=kwargs.get("device", "cpu")).view(1, 1, -1, 1)
    row, head = torch.arange(batch, device=at.device).view(-1, 1, 1, 1), torch.zeros_like(at)
    before, after = at[:, :, :-1], at[:, :, 1:]
    if mask_function(row, head[:, :, 1:], before, after).any():
        return dense()  # not causal
    begins = ~mask_function(row, head[:, :, 1:], after, before).expand(batch, 1, -1, 1).flatten(1)
    return _documents(F.pad(begins, (1, 0), value=True), q_length) if begins.any() else None


def _documents(begins: Tensor, q_length: int, padding: Tensor | None = None) -> Tensor:
    """cu_seqlens ``[1, 1, 2, documents + 1]`` from where documents of keys begin, bool ``[batch, keys]``.

    The queries are the last ``q_length`` of each row; a document may have none of them. Padding is two documents, one
    of its queries and one of its keys: it is not seen and sees nothing.
    """
    batch, keys = begins.shape
    row, column = begins.nonzero(as_tuple=True)
    cu_q = row * q_length + (column - (keys - q_length)).clamp(min=0)
    starts = torch.stack([cu_q, row * keys + column])
    ends = torch.tensor([[batch * q_length], [batch * keys]], device=begins.device)
    if padding is not None:
        between = torch.stack([torch.cat([starts[0, 1:], ends[0]]), starts[1]])
        kept = torch.stack([torch.ones_like(row, dtype=torch.bool), padding[row, column]], 1).flatten()
        starts = torch.stack([starts, between], 2).flatten(1)[:, kept]
    return torch.cat([starts, ends], 1).to(torch.int32)[None, None]


# ---- who asks for them ----

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
REGISTRY = "ALL_ATTENTION_FUNCTIONS"
# Of transformers' functions that make masks those that ask the registry for what ours has, or don't ask.
CAUSAL_MASKS = {"create_causal_mask", "create_sliding_window_causal_mask"}
MASKS = CAUSAL_MASKS | {
    "create_recurrent_attention_mask", "create_bidirectional_mask", "create_bidirectional_sliding_window_mask",
}  # fmt: skip


class _Registry:
    """transformers' registry, with ours in place of the implementation that was chosen at patch()."""

    def __init__(self, chosen: str) -> None:
        self.chosen = chosen

    def get_interface(self, name: str, default: Callable) -> Callable:
        if name != self.chosen:
            return ALL_ATTENTION_FUNCTIONS.get_interface(name, default)
        return functools.partial(attention_forward, eager=default) if name == "eager" else attention_forward


def registry_forward(original: Callable, *, chosen: str) -> Callable:
    """``original``, the forward of an attention, asking our registry."""
    return exchanged(original, chosen, {REGISTRY: lambda theirs: _Registry(chosen)})


def masks_forward(original: Callable, *, chosen: str) -> Callable:
    """``original``, the forward of the model around attentions, making masks of our form.

    Under torch.compile it makes none where none is needed: transformers would look for packed sequences in the
    positions that it counts itself, which under torch.compile it can do with a mask of all pairs only. A mask that is
    4-dimensional already it hands on as it is.
    """
    names = tuple(inspect.signature(original).parameters)[1:]
    hints = ("attention_mask", "position_ids", *_CACHES)
    ours = exchanged(original, "mask", dict.fromkeys(MASKS, in_our_form))

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        kwargs |= zip(names, args, strict=False)
        if self.config._attn_implementation != chosen:
            return original(self, **kwargs)
        if torch.compiler.is_compiling():
            if all(kwargs.get(hint) is None for hint in hints):
                kwargs["attention_mask"] = torch.empty(0, 0, 0, 0)
        elif _generates_from_padding(kwargs):
            return original(self, **kwargs)
        return ours(self, **kwargs)

    return forward


_CACHES = ("past_key_values", "cache")  # what a cache is called


def _generates_from_padding(kwargs: dict[str, Any]) -> bool:
    """A prompt padded on the right: its next token comes from the hidden state of padding, which must be theirs."""
    mask = kwargs.get("attention_mask")
    cached = kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in _CACHES)
    if not cached or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < 2:
        return False
    return not bool(mask[:, -1].all())


class _Ours:
    """A configuration, but that our attention is chosen."""

    _attn_implementation = NAME

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def in_our_form(create: Callable) -> Callable:
    """transformers' function ``create``, that makes a mask, making one of ours."""
    names = tuple(inspect.signature(create).parameters)

    @functools.wraps(create)
    def make(*args: Any, **kwargs: Any) -> Any:
        kwargs |= zip(names, args, strict=False)
        kwargs["config"] = _Ours(kwargs["config"])
        if create.__name__ in CAUSAL_MASKS and _begins_packed(kwargs):
            kwargs |= {name: None for name in _CACHES if name in kwargs}
        return create(**kwargs)

    return make


def _begins_packed(kwargs: dict[str, Any]) -> bool:
    """Packed sequences that go into a cache still empty: transformers looks for them only without a cache."""
    cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
    positions = kwargs.get("position_ids")
    if cache is None or torch.compiler.is_compiling() or not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    if kwargs.get("attention_mask") is not None or positions.shape[1] == 1 or getattr(cache, "is_compileable", False):
        return False
    begins = positions[:, 1:] == 0
    if not begins.any() or not (begins | (positions.diff(dim=1) == 1)).all():
        return False
    return cache.get_seq_length() == 0


def set_attn_implementation(self: PreTrainedModel, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
    """transformers' method; whatever it is told takes the place of our attention, which :func:`unpatch` and
    :func:`patch` bring back."""
    patched = [m for m in self.modules() if any(each.make in _OURS for each in steps_of(m))]
    blocked = next((why for why in map(why_not_back, patched) if why), None)
    if blocked:
        raise UserError(f"set_attn_implementation: {blocked}; undo that first")
    super(patched_class(self), self).set_attn_implementation(attn_implementation, *args, **kwargs)
    if not isinstance(attn_implementation, str):
        return  # of the parts named there, those that get another one than at patch() call it
    for module in patched:
        kept = tuple(each for each in steps_of(module) if each.make not in _OURS)
        swap_back(module)
        if kept:
            swap(module, kept)


def _same_forward(original: Callable) -> Callable:
    return original


_CHANGEABLE = Step(_same_forward, methods=(("set_attn_implementation", set_attn_implementation),))
_OURS = (registry_forward, masks_forward, _same_forward)


def looks_like_attention(module: nn.Module) -> bool:
    if REGISTRY in names_in(class_forward(module)):
        return True
    around = any(REGISTRY in names_in(class_forward(m)) for m in module.modules())
    return type(module).__name__.endswith("Attention") and not around


def find_attention(
    name: str, module: nn.Module, untried: str | None, models: list[PreTrainedModel], listed: bool
) -> Finding:
    """``models`` are those around ``module``, the innermost first, which makes its masks."""
    forward, kind = class_forward(module), type(module).__name__
    names = names_in(forward)
    if REGISTRY not in names or "get_interface" not in names:
        return Finding("attention", name, kind, "it does not ask transformers' attention registry", disagrees=True)
    owner = models[0] if models else None
    why_not = _why_not(module, names, owner) or taken(module)
    if not why_not and not listed and not owner._supports_sdpa:
        why_not = "it may need the masks that transformers makes for eager attention"
    if why_not or untried:
        return Finding("attention", name, kind, why_not or untried)
    chosen = module.config._attn_implementation
    steps = [(module, step(registry_forward, chosen=chosen)), *((model, _CHANGEABLE) for model in models)]
    if not taken(owner):
        steps.append((owner, step(masks_forward, chosen=chosen)))
    return Finding("attention", name, kind, f"flash_attention (was {chosen})", tuple(steps))


def _why_not(module: nn.Module, names: set[str], owner: PreTrainedModel | None) -> str | None:
    config = getattr(module, "config", None)
    if owner is None or config is not owner.config:
        return "the model around it has another configuration"
    rates = (getattr(module, name, 0.0) for name in ("attention_dropout", "attn_dropout", "dropout"))
    dropout = max(getattr(rate, "p", rate) for rate in rates)
    if dropout:
        return f"the kernel has no dropout, its configuration says {dropout}"
    makers = {n for n in names_in(class_forward(owner)) if n.startswith("create_") and n.endswith("_mask")}
    if makers - MASKS:
        return f"the model around it makes masks by {', '.join(sorted(makers - MASKS))}"
    causal_masks = makers and not any("bidirectional" in maker for maker in makers)
    if causal_masks and {m.is_causal for m in owner.modules() if hasattr(m, "is_causal")} == {False}:
        return "it is causal by its mask alone"
    if getattr(config, "sliding_window", None) and "sliding_window" not in names:
        return "it has a window, and does not tell the attention function of it"
    if "position_bias" in names:
        return "the kernel takes no bias of positions"
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        return "this transformers is too old (before 5.8)"
    return None
