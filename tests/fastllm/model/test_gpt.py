from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.config import ModelConfig
from fastllm.data.loader import cu_seqlens_of
from fastllm.kernels import use_backend
from fastllm.model.flops import count_parameters
from fastllm.model.gpt import GPT
from fastllm.model.rope import rotary_tables
from tests.conftest import GPU

SMALL = ModelConfig(vocab_size=300, max_seq_len=32, dim=64, layers=3, heads=4, kv_heads=2, ffn_dim=96)
STRETCHED = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_max_seq_len": 8}
SHAPES = [
    SMALL,
    replace(SMALL, tie_embeddings=False),
    replace(SMALL, qk_norm=True, kv_heads=1),
    replace(SMALL, qkv_bias=True, attention_dim=96, window=7, **STRETCHED),
]
shapes = pytest.mark.parametrize("config", SHAPES, ids=["tied", "untied", "qk_norm", "bias, window, yarn"])


def some_tokens(config: ModelConfig, batch: int = 2, seq: int = 32) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))


def awake(config: ModelConfig) -> GPT:
    """A GPT in which every layer counts: those of a fresh one write zeros to the residual stream."""
    model, generator = GPT(config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)
    return model


def gradients(model: GPT, tokens: Tensor) -> list[Tensor]:
    """The loss, then the gradient of each parameter."""
    loss = model(tokens[:, :-1], tokens[:, 1:])
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@shapes
def test_loss_is_that_of_the_logits(config):
    model, tokens = awake(config), some_tokens(config)
    logits = model(tokens[:, :-1])
    assert logits.shape == (2, 31, config.vocab_size)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), expected)


@shapes
def test_first_loss_is_near_that_of_guessing(config):
    model, tokens = GPT(config), some_tokens(config, 8)
    assert model(tokens, tokens).item() < 1.5 * torch.tensor(float(config.vocab_size)).log().item()


@shapes
def test_gradients_reach_every_parameter(config):
    model, tokens = awake(config), some_tokens(config)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


@shapes
def test_a_token_does_not_see_later_ones(config):
    model, tokens = awake(config), some_tokens(config)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_rotary_tables_grow(monkeypatch):
    whole = GPT(SMALL)
    monkeypatch.setattr("fastllm.model.gpt.TABLE_LENGTH", 4)
    model, tokens = GPT(SMALL), some_tokens(SMALL)
    assert len(model.model.cos) == 4
    model(tokens[:, :5])
    assert len(model.model.cos) == 8
    torch.testing.assert_close(model(tokens), whole(tokens))
    for table, expected in zip((model.model.cos, model.model.sin), rotary_tables(SMALL), strict=True):
        assert torch.equal(table, expected)


def test_more_tokens_than_max_seq_len():
    with pytest.raises(ValueError, match=r"40 tokens are more than max_seq_len \(32\)"):
        GPT(SMALL)(some_tokens(SMALL, seq=40))


LENGTHS = [[5, 1, 26], [32], [10, 22], [1] * 32]  # of documents in sequences of 32


def packed(config: ModelConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens and targets, some of them ignored, and how documents lie in them, with empty ones at the end."""
    tokens = some_tokens(config, 8, 32)
    targets = tokens[4:].masked_fill(tokens[4:] % 7 == 0, -100)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return tokens[:4], targets, {"positions": positions, "cu_seqlens": cu_seqlens_of(positions)}


@shapes
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_packed_documents_are_as_alone(config, backend):
    """The sum of their losses, and its gradient. The other backends: test_packed_equals_unpacked of attention."""
    model = awake(config)
    tokens, targets, packing = packed(config)
    with use_backend(backend):
        loss = model(tokens, targets, reduction="sum", **packing)
        found = torch.autograd.grad(loss, list(model.parameters()))
    cuts = [n for row in LENGTHS for n in row]
    documents = zip(tokens.flatten().split(cuts), targets.flatten().split(cuts), strict=True)
    alone = sum(model(t[None], y[None], reduction="sum") for t, y in documents)
    expected = torch.autograd.grad(alone, list(model.parameters()))
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    for gradient, wanted in zip(found, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
    assert (model(tokens, targets, reduction="sum") - alone).abs() > 1  # they would see each other


def test_packed_documents_compile_few_times():
    """Not for each number of documents."""
    model, compiled = awake(SMALL), 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        nonlocal compiled
        compiled += 1
        return graph.forward

    run = torch.compile(model, backend=count, fullgraph=True)
    tokens = some_tokens(SMALL, 4)
    for documents in (1, 2, 3, 5, 8, 9, 12, 16, 20, 32):
        positions = torch.arange(32).remainder(32 // min(documents, 32) or 1).expand(4, 32)
        packing = {"positions": positions, "cu_seqlens": cu_seqlens_of(positions)}
        out = run(tokens, tokens, reduction="sum", **packing)
        torch.testing.assert_close(out, model(tokens, tokens, reduction="sum", **packing))
    assert compiled <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_kernels_are_as_near_to_float64_as_pytorch_is(dtype, backend, request):
    """Loss and gradients. On a CPU the GPU's kernels run in Triton's interpreter and in the emulator."""
    if GPU and backend != "cpu":
        pytest.skip("the interpreter is off where there is a GPU")
    if backend == "cuda":
        request.getfixturevalue("simt")
    model, tokens = awake(SHAPES[2]).to(dtype), some_tokens(SMALL, 4)
    with use_backend(backend):
        kernels = gradients(model, tokens)
    with use_backend("torch"):
        eager = gradients(model, tokens)
        exact = gradients(model.double(), tokens)

    def distance(results: list[Tensor], part: Callable[[Tensor], Tensor] = lambda t: t) -> float:
        return sum((part(r.double()) - part(e)).square().sum() for r, e in zip(results, exact, strict=True)) ** 0.5

    size = sum(e.square().sum() for e in exact) ** 0.5
    assert distance(kernels) <= 2 * distance(eager) + torch.finfo(dtype).eps * size


def test_weights_depend_on_the_seed_and_the_name_alone():
    first, deeper = GPT(SMALL, seed=7).state_dict(), GPT(replace(SMALL, tie_embeddings=False), seed=7).state_dict()
    assert all(torch.equal(deeper[name], weight) for name, weight in first.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], GPT(SMALL, seed=8).state_dict()[name])
    assert not torch.equal(first[name], first[name.replace("0", "1")])


@shapes
def test_parameters_are_counted(config):
    assert count_parameters(config)["total"] == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_those_of_hugging_face_llama(tied):
    names = set(GPT(replace(SMALL, layers=1, tie_embeddings=tied)).state_dict())
    assert names == {
        "model.embed_tokens.weight", "model.norm.weight", *(() if tied else ("lm_head.weight",)),
        *(f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")),
        *(f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }  # fmt: skip


def test_overfits_a_batch():
    model, tokens = GPT(replace(SMALL, layers=2)), some_tokens(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
