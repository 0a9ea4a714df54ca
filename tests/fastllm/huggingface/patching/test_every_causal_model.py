"""Every causal language model class of the installed transformers: patched, it computes what it did."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fastllm
from tests.fastllm.huggingface.patching.tiny import CLASSES, VOCAB, make, train

TOKENS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.clone()
LABELS[0, 2:5] = -100
LEFT, RIGHT = torch.ones_like(TOKENS), torch.ones_like(TOKENS)
LEFT[0, :4] = 0
RIGHT[1, 9:] = 0


def forward(model: PreTrainedModel, mask: Tensor | None) -> list[Tensor]:
    """The logits of text."""
    with torch.no_grad():
        logits = model(input_ids=TOKENS, attention_mask=mask).logits
    return [logits if mask is None else logits[mask.bool()]]


def training(model: PreTrainedModel, **more: Any) -> list[Tensor]:
    """The loss and all gradients."""
    model.train()
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=LABELS, **more).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.eval()
    return [loss.detach(), *grads]


def generated(model: PreTrainedModel) -> list[Tensor]:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(TOKENS, attention_mask=LEFT, **options)]


WAYS: dict[str, Callable[[PreTrainedModel], list[Tensor]]] = {
    "logits": lambda model: forward(model, None),
    "left padding": lambda model: forward(model, LEFT),
    "right padding": lambda model: forward(model, RIGHT),
    "training": training,
    "generation": generated,
}
COPIES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


def results_of(model: PreTrainedModel) -> dict[str, list[Tensor] | Exception]:
    found: dict[str, list[Tensor] | Exception] = {}
    for name, way in WAYS.items():
        try:
            found[name] = [t.clone() for t in way(model)]
        except Exception as error:
            found[name] = error
            model.zero_grad()
            model.eval()
    return found


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest, relative to the largest number of its tensor."""
    if len(a) != len(b):
        return float("inf")
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if y.numel()]
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-3)).item() for x, y in pairs)


def failures(name: str, folder: Path) -> Iterator[str]:
    """``model`` is patched before it gets its weights: what is found out by trying must not depend on them."""
    plain, model = make(name), make(name, trained=False)
    theirs = results_of(plain)
    fastllm.patch(model)
    train(model)
    ours = results_of(model)
    for way, expected in theirs.items():
        if isinstance(expected, Exception):
            if not isinstance(ours[way], Exception):
                continue
            yield f"{way}: unpatched {expected!r:.200}"
        elif isinstance(ours[way], Exception):
            yield f"{way}: {ours[way]!r:.300}"
        elif way == "generation":
            if not torch.equal(ours[way][0], expected[0]):
                yield f"{way}: {ours[way][0].tolist()} {expected[0].tolist()}"
        elif not difference(ours[way], expected) <= 1e-4:
            yield f"{way}: differs by {difference(ours[way], expected):.2g}"
    for way, copied in COPIES.items():
        try:
            twin = copied(model)
        except Exception as error:
            yield f"{way}: {error!r:.300}"
            continue
        if not torch.equal(forward(twin, None)[0], forward(model, None)[0]):
            yield f"{way}: the copy computes something else"
        fastllm.unpatch(twin)
        if not torch.equal(forward(twin, None)[0], theirs["logits"][0]):
            yield f"{way}: the copy unpatched computes something else"
    for kind, each in (("plain", plain), ("patched", model)):
        each.save_pretrained(folder / kind)
    for file in sorted((folder / "plain").iterdir()):
        twin = folder / "patched" / file.name
        if hashlib.sha256(file.read_bytes()).digest() != hashlib.sha256(twin.read_bytes()).digest():
            yield f"save: {file.name} differs"
    loaded = type(plain).from_pretrained(folder / "patched")
    again = type(plain).from_pretrained(folder / "plain")
    if not torch.equal(forward(loaded, None)[0], forward(again, None)[0]):
        yield "reload: the model loaded computes something else"
    fastllm.unpatch(model)
    if not torch.equal(forward(model, None)[0], theirs["logits"][0]):
        yield "unpatch: it computes something else"
