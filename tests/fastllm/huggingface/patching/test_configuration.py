"""The configuration of a patched model, its attention implementation, patch() twice, and packed batches."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

import fastllm
from fastllm.errors import UserError
from fastllm.huggingface.patching import attention
from tests.fastllm.huggingface.patching.models import VOCAB, loss_and_gradients, make, some_text

DECODERS = pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])
LAYERS = 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules whose attention is ours."""
    seen, ours = [], attention.attention_forward

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(module).__name__)
        return ours(module, *args, **kwargs)

    monkeypatch.setattr(attention, "attention_forward", counted)
    return seen


# ---- a new model ----


@pytest.mark.parametrize("config", ["model", "decoder", "copy", "text config"])
@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
@torch.no_grad()
def test_a_new_model_is_not_patched(config, chosen, calls):
    model, tokens = make("mistral"), some_text()["input_ids"]
    model.set_attn_implementation(chosen)
    expected = model.eval()(tokens).logits
    fastllm.patch(model)
    configs = {"model": model.config, "decoder": model.model.config, "copy": copy.deepcopy(model.config)}
    new = AutoModelForCausalLM.from_config(configs.get(config, model.config.get_text_config()))
    assert new.config._attn_implementation == chosen
    new.load_state_dict(model.state_dict())
    assert torch.equal(new.eval()(tokens).logits, expected)
    assert not calls
    assert {type(m) for m in new.modules()}.isdisjoint(
        type(m) for m in model.modules() if "RMSNorm" in type(m).__name__
    )
    other = {"sdpa": "eager", "eager": "sdpa"}[chosen]
    new.set_attn_implementation(other)
    assert {layer.self_attn.config._attn_implementation for layer in new.model.layers} == {other}
    torch.testing.assert_close(new(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert not calls


# ---- the attention implementation ----


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
@torch.no_grad()
def test_set_attn_implementation(chosen, calls):
    model, tokens = make("llama").eval(), some_text()["input_ids"]
    fastllm.patch(model)
    expected = model(tokens).logits
    assert len(calls) == LAYERS
    model.set_attn_implementation(chosen)
    assert model.config._attn_implementation == chosen
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == LAYERS, "another attention is called"
    notes = {f.note for f in fastllm.patch(model).left}
    assert notes == {"undone since, by set_attn_implementation"}
    fastllm.unpatch(model)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config._attn_implementation == chosen
    fastllm.patch(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * LAYERS


def test_an_attention_implementation_that_there_is_not(calls):
    model, batch = make("llama"), some_text()
    fastllm.patch(model)
    with pytest.raises(ValueError, match="not supported"):
        model.set_attn_implementation("nonesuch")
    assert model(**batch).loss.isfinite()
    assert len(calls) == LAYERS


def test_the_attention_implementation_of_a_part(calls):
    """The decoder's own method, and of a model whose head is not patched."""
    model, batch = make("mixtral"), some_text()
    fastllm.patch(model)
    model.model.set_attn_implementation("eager")
    assert model(**batch).loss.isfinite()
    assert not calls
    fastllm.unpatch(model)
    assert type(model.model) is transformers.MixtralModel


@torch.no_grad()
def test_an_implementation_that_is_assigned(calls):
    model, tokens = make("gemma3").eval(), some_text()["input_ids"]
    fastllm.patch(model)
    expected = model(tokens).logits
    model.config._attn_implementation = "eager"
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == LAYERS
    model.config._attn_implementation = "sdpa"
    assert torch.equal(model(tokens).logits, expected)
    assert len(calls) == 2 * LAYERS


def test_set_attn_implementation_of_a_wrapped_model():
    model = make("llama")
    fastllm.patch(model)
    attn = model.model.layers[0].self_attn
    mine = type(attn)
    attn.__class__ = type("FSDPLlamaAttention", (mine,), {})
    with pytest.raises(UserError, match="set_attn_implementation: the class of a LlamaAttention was replaced"):
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt-oss", "qwen3", "phi3", "olmo2"]
)
@pytest.mark.parametrize("ask", ["config", "call", "after set_attn_implementation"])
@torch.no_grad()
def test_output_attentions(family, ask):
    def attentions(patch: bool) -> tuple[Tensor, ...]:
        model = make(family).eval()
        if ask == "after set_attn_implementation":
            if patch:
                fastllm.patch(model)
            model.set_attn_implementation("eager")
            model.config.output_attentions = True
        else:
            model.set_attn_implementation("eager")
            if patch:
                fastllm.patch(model)
        if ask == "config":
            model.config.output_attentions = True
        return model(some_text()["input_ids"], **({"output_attentions": True} if ask == "call" else {})).attentions

    ours, theirs = attentions(True), attentions(False)
    assert len(ours) == len(theirs) == LAYERS
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


# ---- twice ----


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_patch_twice(family):
    model = make(family)
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    first = fastllm.patch(model)
    kinds, expected = [type(m) for m in model.modules()], loss_and_gradients(model, some_text())
    second = fastllm.patch(model)
    assert second == first
    assert str(second) == str(first)
    assert [type(m) for m in model.modules()] == kinds
    assert all(map(torch.equal, loss_and_gradients(model, some_text()), expected))
    fastllm.unpatch(model)
    for name, module in model.named_modules():
        assert (type(module), vars(module)) == before[name]
    with pytest.raises(UserError, match="not patched"):
        fastllm.unpatch(model)


def test_patch_around_a_patched_model():
    model = make("llama")
    first = fastllm.patch(model)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert fastllm.patch(lora) == first
    fastllm.unpatch(lora)
    assert type(model) is transformers.LlamaForCausalLM
    fastllm.patch(model.model)
    with pytest.raises(UserError, match="a part of the model is patched already, LlamaForCausalLM is not"):
        fastllm.patch(model)


def test_a_copy_is_patched_already():
    model = make("llama")
    first = fastllm.patch(model)
    assert str(fastllm.patch(copy.deepcopy(model))) == str(first)


def test_patched_inside_patched():
    model = make("llama")
    fastllm.patch(model)
    with fastllm.patched(model):
        pass
    assert type(model) is not transformers.LlamaForCausalLM
    with fastllm.patched(make("llama")) as report:
        assert report.replaced


# ---- packed batches ----

LENGTHS = (10, 1, 7, 6)
DOCUMENTS = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]


def loss_of_documents(model: Any) -> Tensor:
    """Each by itself."""
    labels = [torch.tensor([d]) for d in DOCUMENTS]
    losses = [model(input_ids=d, labels=d, use_cache=False).loss * (d.shape[1] - 1) for d in labels if d.shape[1] > 1]
    return torch.stack(losses).sum() / sum(n - 1 for n in LENGTHS)


FORMS: dict[str, dict[str, Any]] = {
    "positions": {},
    "flash": {"return_flash_attn_kwargs": True},
    "flash alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "sequence index": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


@DECODERS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_cache", [False, True, None], ids=["no cache", "cache", "default"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_flattened_batch_is_its_documents(family, form, use_cache, training):
    model = make(family).train(training)
    expected = loss_of_documents(model)
    flatten = DataCollatorWithFlattening(return_tensors="pt", **FORMS[form])
    batch = flatten([{"input_ids": d} for d in DOCUMENTS])
    more = {} if use_cache is None else {"use_cache": use_cache}
    fastllm.patch(model)
    torch.testing.assert_close(model(**batch, **more).loss, expected)


@DECODERS
def test_packed_positions_in_a_loop_by_hand(family):
    """With the cache that is the default, where transformers' sdpa lets documents see each other."""
    model = make(family).eval()
    tokens = torch.tensor([[token for d in DOCUMENTS for token in d]])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    alone = torch.cat([model(torch.tensor([d])).logits for d in DOCUMENTS], 1)
    fastllm.patch(model)
    out = model(tokens, position_ids=positions)
    torch.testing.assert_close(out.logits, alone, rtol=1e-4, atol=1e-4)
    assert out.past_key_values.get_seq_length() == sum(LENGTHS)


@torch.no_grad()
def test_positions_that_are_not_packed():
    """Of a prompt in pieces, and of positions that leave some out."""
    model, tokens = make("llama").eval(), some_text()["input_ids"]
    first = model(tokens[:, :10], use_cache=True)
    piece = {"past_key_values": first.past_key_values, "position_ids": torch.arange(10, 24)[None]}
    expected = model(tokens[:, 10:], **piece).logits
    wide = {"position_ids": 2 * torch.arange(24)[None], "use_cache": True}
    apart = model(tokens, **wide).logits
    fastllm.patch(model)
    first = model(tokens[:, :10], use_cache=True)
    piece["past_key_values"] = first.past_key_values
    torch.testing.assert_close(model(tokens[:, 10:], **piece).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens, **wide).logits, apart, rtol=1e-4, atol=1e-4)


# ---- padding on the right ----


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt-oss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_from_padding_on_the_right(family, cache):
    """What the unpatched model makes of it, token by token."""
    model, tokens = make(family).eval(), some_text(batch=3)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, 20:] = mask[2, 11:] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    options |= {"attention_mask": mask, "return_dict_in_generate": True, "cache_implementation": cache}
    options |= {"disable_compile": True}
    theirs = model.generate(tokens, **options)
    fastllm.patch(model)
    ours = model.generate(tokens, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


# ---- what the caller has set ----


def test_patch_in_inference_mode():
    model, batch = make("llama"), some_text()
    expected = loss_and_gradients(model, batch)
    with torch.inference_mode():
        report = fastllm.patch(model)
    assert not report.left
    for mine, their in zip(loss_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)
