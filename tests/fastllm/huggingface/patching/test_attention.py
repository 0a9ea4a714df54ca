"""Attention through transformers' registry: padding, packing, windows, caches, against transformers' own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import fastllm
from fastllm.huggingface.patching.attention import attention_forward, attention_mask, in_our_form
from tests.fastllm.huggingface.patching.models import VOCAB, make

FAMILIES = pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt-oss"])
TOKENS = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(TOKENS)
PADDED[0, :7] = 0  # on the left
PADDED[1, 20:] = 0  # on the right
HOLED = PADDED.clone()
HOLED[2, 5:9] = 0  # in between
# transformers 5.24 calls past_key_values so
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
PACKED = torch.cat([torch.arange(n) for n in (10, 1, 13)]).expand(3, -1)


@torch.no_grad()
def both(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    theirs = model(TOKENS, **inputs).logits
    with fastllm.patched(model) as report:
        assert any(f.part == "attention" for f in report.replaced)
        return model(TOKENS, **inputs).logits, theirs


@FAMILIES
@pytest.mark.parametrize(
    "mask", [None, torch.ones_like(TOKENS), PADDED, HOLED], ids=["none", "ones", "padded", "holed"]
)
def test_padding(family, mask):
    ours, theirs = both(make(family).eval(), attention_mask=mask)
    seen = torch.ones_like(TOKENS, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])  # the others don't look for them
def test_packed_sequences(family):
    model = make(family).eval()
    ours, theirs = both(model, position_ids=PACKED, use_cache=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    alone = model(TOKENS[:, 11:]).logits
    torch.testing.assert_close(ours[:, 11:], alone, rtol=1e-4, atol=1e-4)


def test_flattened_batches():
    """What transformers' DataCollatorWithFlattening hands over beside the positions."""
    cu = torch.tensor([0, 10, 11, 24], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 13, "max_length_k": 13}
    model = make("llama").eval()
    packed = model(TOKENS[:1], position_ids=PACKED[:1], use_cache=False).logits
    with fastllm.patched(model):
        ours = model(TOKENS[:1], position_ids=PACKED[:1], use_cache=False, **lengths).logits
    torch.testing.assert_close(ours, packed, rtol=1e-4, atol=1e-4)


@FAMILIES
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(family, cache):
    model = make(family).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"attention_mask": PADDED[[0, 2]], "cache_implementation": cache, "eos_token_id": None}
    options |= {"disable_compile": True, "pad_token_id": 0}
    tokens = TOKENS[[0, 2]]
    theirs = model.generate(tokens, **options)
    with fastllm.patched(model):
        ours = model.generate(tokens, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


@FAMILIES
@torch.no_grad()
def test_a_prompt_in_pieces(family):
    model = make(family).eval()
    whole = model(TOKENS).logits
    with fastllm.patched(model):
        cache, pieces = DynamicCache(config=model.config), []
        for piece in TOKENS.split([9, 1, 12, 2], 1):
            pieces.append(model(piece, use_cache=True, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt-oss"])
@torch.no_grad()
def test_attentions_where_somebody_asks(family):
    model = make(family).eval()
    model.set_attn_implementation("eager")
    theirs = model(TOKENS, attention_mask=PADDED, output_attentions=True)
    with fastllm.patched(model):
        ours = model(TOKENS, attention_mask=PADDED, output_attentions=True)
    rows = PADDED.bool()[:, None, :, None]
    for mine, their in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(mine * rows, their * rows, rtol=1e-4, atol=1e-5)


def test_a_mask_of_the_users_own():
    model = make("llama").eval()
    mask = torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(1)) < 0.7
    mask |= torch.eye(24, dtype=torch.bool)
    ours, theirs = both(model, attention_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_masks_take_the_memory_of_a_line():
    """No mask of all pairs for plain, padded and packed text, causal or in a window."""
    model = make("gemma2").eval()
    for create in (create_causal_mask, create_sliding_window_causal_mask):

        def mask(padding: Tensor | None, positions: Tensor | None = None, create=create) -> Tensor | None:
            embedded = TOKENS.float().unsqueeze(-1)
            return in_our_form(create)(model.config, embedded, padding, position_ids=positions, **{CACHE: None})

        assert mask(None) is None
        assert mask(torch.ones_like(TOKENS)) is None
        assert mask(PADDED[[1, 1, 2]]) is None, "padding on the right is in the future"
        assert mask(PADDED)[0, 0].tolist() == [[0, 7, 7, 24, 44, 48, 48, 72], [0, 0, 7, 24, 44, 44, 48, 72]]
        packed = mask(None, PACKED)
        assert packed[0, 0].tolist() == [[0, 10, 11, 24, 34, 35, 48, 58, 59, 72]] * 2
        assert mask(HOLED).shape == (3, 1, 24, 24)


def test_padding_becomes_documents():
    """Padding sees nothing and is not seen: its queries and its keys are documents of their own."""
    mask = attention_mask(2, 4, 6, q_offset=2, attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6]).bool())
    #          padding's queries | its keys | text | second row
    assert mask[0, 0].tolist() == [[0, 1, 1, 4, 8], [0, 0, 3, 6, 12]]


def test_a_mask_of_keys_alone():
    """As FlashAttention's, which generate() makes outside of the model."""
    module = torch.nn.Module()
    q, k, v = torch.randn(3, 3, 2, 24, 8).unbind()
    causal = torch.ones(24, 24, dtype=torch.bool).tril() & PADDED.bool()[:, None, None]
    expected, _ = attention_forward(module, q, k, v, causal)
    ours, _ = attention_forward(module, q, k, v, PADDED)
    torch.testing.assert_close(ours[PADDED.bool()], expected[PADDED.bool()])


def test_dropout_raises():
    q = torch.ones(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"no dropout, it is 0\.1: set the model's attention dropout to 0"):
        attention_forward(torch.nn.Module(), q, q, q, None, dropout=0.1)
