"""Every causal language model class of the installed transformers: patched, it computes what it did."""

from __future__ import annotations

import copy
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
from tests.fastllm.huggingface.patching.tiny import CLASSES, GIVEN, VOCAB, make, train

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
    "training, summed": lambda model: training(model, num_items_in_batch=7),
    "generation": generated,
}
COPIES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


FAILS_UNPATCHED = {
    "GitForCausalLM": ("training", "training, summed"),  # it counts the tokens of an image
    **dict.fromkeys(
        ("MusicgenForCausalLM", "MusicgenMelodyForCausalLM"), ("training", "training, summed", "generation")
    ),  # their labels are codes
}


def results_of(model: PreTrainedModel) -> dict[str, list[Tensor] | Exception]:
    found: dict[str, list[Tensor] | Exception] = {}
    for name, way in WAYS.items():
        torch.manual_seed(0)  # some routers draw
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
    return max([((x - y).abs().max() / y.abs().max().clamp(min=1e-3)).item() for x, y in pairs], default=0.0)


def why_too_far(ours: list[Tensor], theirs: list[Tensor], exact: Callable[[], list[Tensor]]) -> str | None:
    """None if equal but for rounding, or where little is left of it, as near to float64 as theirs."""
    if difference(ours, theirs) <= 1e-4:
        return None
    torch.manual_seed(0)
    reference = exact()
    mine, their = difference(ours, reference), difference(theirs, reference)
    return None if mine <= 2 * their + torch.finfo(torch.float32).eps else f"error {mine:.2g}, unpatched {their:.2g}"


def failures(name: str, folder: Path) -> Iterator[str]:
    """``model`` is patched before it gets its weights: what is found out by trying must not depend on them."""
    plain, model = make(name), make(name, trained=False)
    theirs = results_of(plain)
    fastllm.patch(model)
    train(model)
    ours = results_of(model)
    for way, expected in theirs.items():
        if isinstance(expected, Exception):
            if way not in FAILS_UNPATCHED.get(name, ()):
                yield f"{way}: unpatched {expected!r:.200}"
            if not isinstance(ours[way], Exception):
                yield f"{way}: the unpatched model raises {expected!r:.200}"
        elif way in FAILS_UNPATCHED.get(name, ()):
            yield f"{way}: the unpatched model does not fail"
        elif isinstance(ours[way], Exception):
            yield f"{way}: {ours[way]!r:.300}"
        elif way == "generation":
            if not torch.equal(ours[way][0], expected[0]):
                yield f"{way}: {ours[way][0].tolist()} {expected[0].tolist()}"
        elif too_far := why_too_far(ours[way], expected, lambda way=way: WAYS[way](make(name).double())):
            yield f"{way}: {too_far}"
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
        if file.read_bytes() != (folder / "patched" / file.name).read_bytes():
            yield f"save: {file.name} differs"
    loaded = type(plain).from_pretrained(folder / "patched")
    again = type(plain).from_pretrained(folder / "plain")
    if not torch.equal(forward(loaded, None)[0], forward(again, None)[0]):
        yield "reload: the model loaded computes something else"
    fastllm.unpatch(model)
    if not torch.equal(forward(model, None)[0], theirs["logits"][0]):
        yield "unpatch: it computes something else"
    yield from failures_of_attentions(name, plain, model)


def failures_of_attentions(name: str, plain: PreTrainedModel, model: PreTrainedModel) -> Iterator[str]:
    """The probabilities, of those that can be told to compute them."""
    fastllm.patch(eager(model))
    try:
        theirs = attentions(eager(plain))
    except Exception as error:
        if "attentions" not in FAILS_UNPATCHED.get(name, ()):
            yield f"attentions: unpatched {error!r:.200}"
        return
    ours = attentions(model)
    if too_far := why_too_far(ours, theirs, lambda: attentions(eager(make(name)).double())):
        yield f"attentions: {len(ours)} for {len(theirs)}, {too_far}"


def eager(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("eager")
    return model


def attentions(model: PreTrainedModel) -> list[Tensor]:
    with torch.no_grad():
        found = getattr(model(input_ids=TOKENS, output_attentions=True), "attentions", None) or ()
    return [t for t in found if isinstance(t, Tensor)]


# They have between them each part and variant of the table, and models that are left.
ALWAYS = (
    "LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM",
    "Phi3ForCausalLM", "Qwen3ForCausalLM", "Qwen3NextForCausalLM", "DeepseekV3ForCausalLM", "FalconH1ForCausalLM",
    "GraniteForCausalLM", "NanoChatForCausalLM", "SeedOssForCausalLM", "CohereForCausalLM", "GPT2LMHeadModel",
    "BertLMHeadModel", "BartForCausalLM", "BloomForCausalLM", "MixtralForCausalLM", "BigBirdPegasusForCausalLM",
    "DeepseekV4ForCausalLM", "HYV4ForCausalLM", "InklingForCausalLM", "BambaForCausalLM", "GraniteSWAForCausalLM",
)  # fmt: skip
# Unpatched, these can't be made small here, or do nothing by themselves.
LEFT_OUT = {
    "Gemma3nForConditionalGeneration": "its vision tower needs timm",
    "Gemma4AssistantForCausalLM": "it wants the hidden states and the cache of the model that it assists",
    "Gemma4UnifiedAssistantForCausalLM": "it wants the hidden states and the cache of the model that it assists",
    "BltForCausalLM": "transformers makes no cache for it: its configuration has no num_hidden_layers",
}
ALL = bool(os.environ.get("FASTLLM_EVERY_MODEL"))
CHOSEN = [name for name in CLASSES if name not in LEFT_OUT and (ALL or name in ALWAYS)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHOSEN)
def test_patched_it_computes_what_it_did(name, tmp_path):
    assert not list(failures(name, tmp_path))


@pytest.mark.parametrize("width", [4, 32])
def test_values_of_another_width_than_keys(width, monkeypatch, tmp_path):
    name = "DeepseekV3ForCausalLM"
    monkeypatch.setitem(GIVEN, name, {**GIVEN[name], "v_head_dim": width})
    assert not list(failures(name, tmp_path))


@pytest.mark.skipif(not ALL, reason="set FASTLLM_EVERY_MODEL=1")
@pytest.mark.parametrize("name", sorted(LEFT_OUT.keys() & CLASSES.keys()))
def test_what_is_left_out_does_not_work(name):
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it raises)
        make(name)(input_ids=TOKENS)


def test_the_classes_that_always_run_meet_each_part_of_the_table():
    found = set()
    for name in set(ALWAYS) & CLASSES.keys():
        for f in fastllm.patch(make(name, trained=False)).replaced:
            variants = [dict(each.options).get(key) for _, each in f.steps for key in ("weight_offset", "joined")]
            found |= {(f.part, variant) for variant in variants if variant is not None} | {f.part}
    variants = {("norm", 0.0), ("norm", 1.0), ("mlp", True), ("mlp", False)}
    assert found == variants | {"norm", "mlp", "rotary", "attention", "loss"}
