from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllm.config import ModelConfig, OptimConfig
from fastllm.model.gpt import GPT
from fastllm.training import muon as muon_module
from fastllm.training.muon import Muon, orthogonalize
from fastllm.training.optim import learning_rate, make_optimizers, state_tensors, step

SMALL = ModelConfig(vocab_size=300, max_seq_len=32, dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=96, qkv_bias=True)
shares = st.floats(0, 1, allow_subnormal=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_updated_once(optimizer, tied):
    model, config = GPT(replace(SMALL, tie_embeddings=tied)), OptimConfig(optimizer=optimizer)
    groups = [g for o in make_optimizers(model, config) for g in o.param_groups]
    held = [p for g in groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (config.weight_decay if p.dim() >= 2 else 0.0)


def test_muon_has_the_matrices_of_the_blocks():
    model = GPT(replace(SMALL, tie_embeddings=False))
    muon, adamw = make_optimizers(model, OptimConfig(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert by_muon == {n for n in names.values() if n.endswith("_proj.weight")}
    assert type(muon) is Muon
    assert type(adamw) is torch.optim.AdamW


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_a_batch(optimizer):
    model, config = GPT(SMALL), OptimConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.0)
    optimizers = make_optimizers(model, config)
    tokens = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(1))
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        step(optimizers, config.lr)
        assert all(p.grad is None for p in model.parameters())
    assert loss.item() < 0.05


def test_a_step_takes_its_learning_rate():
    model = GPT(SMALL)
    optimizers = make_optimizers(model, OptimConfig(optimizer="muon"))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    step(optimizers, 0.0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_muon_is_that_of_pytorch(monkeypatch):
    """In bfloat16, in which PyTorch's computes."""
    monkeypatch.setattr(muon_module, "compute_dtype", lambda device: torch.bfloat16)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 40), (40, 24), (32, 32))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}
    optimizers = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options), Muon(ours, **options)
    before = [p.detach().clone() for p in ours]
    for _ in range(3):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, old in zip(theirs, ours, before, strict=True):
        moved = (a - old).norm()
        assert (a - b).norm() <= 0.02 * moved  # bfloat16 has 8 bits


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5), (1, 7)])
def test_orthogonal(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_update_changes_nothing(optimizer):
    model = GPT(SMALL)
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer))
    tokens = torch.randint(0, 300, (2, 33))

    def backward() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()

    backward()
    step(optimizers, 1e-2, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0))
    state = dict(model.named_parameters()) | state_tensors(model, optimizers)
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    backward()
    for p in model.parameters():
        p.grad.fill_(torch.nan)
    step(optimizers, 1e-2, grad_scale=torch.tensor(torch.nan), found_inf=torch.tensor(1.0))
    assert all(torch.equal(state[name], before[name]) for name in before)
    backward()
    step(optimizers, 1e-2, grad_scale=torch.tensor(1.0), found_inf=torch.tensor(0.0))
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() >= 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_grad_scale_divides_the_gradients(optimizer):
    models = [GPT(SMALL) for _ in range(2)]
    tokens = torch.randint(0, 300, (2, 33))
    for model, scale in zip(models, (1.0, 8.0), strict=True):
        optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer))
        for _ in range(2):
            (model(tokens[:, :-1], tokens[:, 1:]) * scale).backward()
            step(optimizers, 1e-2, grad_scale=torch.tensor(scale), found_inf=torch.tensor(0.0))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_state_is_made_without_a_step():
    model = GPT(SMALL)
    before = [p.detach().clone() for p in model.parameters()]
    state = state_tensors(model, make_optimizers(model, OptimConfig(optimizer="muon")))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not any(tensor.any() for tensor in state.values())
    assert {name.rpartition(".")[0] for name in state} == {name for name, _ in model.named_parameters()}


SCHEDULES = pytest.mark.parametrize("schedule", ["wsd", "linear", "cosine"])


@SCHEDULES
def test_schedules_at_their_corners(schedule):
    config = OptimConfig(schedule=schedule, lr=2.0, warmup_ratio=0.1, decay_ratio=0.4, min_lr_ratio=0.25)
    assert learning_rate(config, 0.0) == 0.0
    assert learning_rate(config, 0.05) == pytest.approx(1.0)
    assert learning_rate(config, 0.1) == pytest.approx(2.0)
    assert learning_rate(config, 1.0) == learning_rate(config, 1.5) == pytest.approx(0.5)
    middle = {"wsd": 2.0, "linear": 1.25, "cosine": 1.25}[schedule]
    assert learning_rate(config, 0.55) == pytest.approx(middle)
    later = {
        "wsd": 1.25,
        "linear": 0.5 + 1.5 * 2 / 9,
        "cosine": 0.5 + 0.75 * (1 + torch.tensor(7 / 9 * torch.pi).cos()),
    }
    assert learning_rate(config, 0.8) == pytest.approx(float(later[schedule]))


@SCHEDULES
@given(
    warmup=shares,
    decay=shares,
    final=shares,
    progress=st.lists(shares, min_size=2, max_size=2).map(sorted),
)
def test_schedules_rise_once_and_fall_once(schedule, warmup, decay, final, progress):
    decay = decay * (1 - warmup)
    config = OptimConfig(schedule=schedule, lr=1.0, warmup_ratio=warmup, decay_ratio=decay, min_lr_ratio=final)
    earlier, later = (learning_rate(config, p) for p in progress)
    assert 0 <= earlier <= 1
    if progress[1] < warmup:
        assert earlier <= later
    elif progress[0] >= warmup:
        assert later <= earlier + 1e-12
        assert later >= final - 1e-12
