"""patch: what it replaces in each family, that nothing changes but the rounding, and that all can be undone."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

import fastllm
from fastllm.errors import UserError
from fastllm.kernels import use_backend
from tests.fastllm.huggingface.patching.models import FAMILIES, assert_as_near, loss_and_gradients, make, some_text

families = pytest.mark.parametrize("family", FAMILIES)
ALL = {"norm", "mlp", "rotary", "attention", "loss"}
# What is left in a family, and a word of why; all the rest is replaced.
LEFT = {
    "gemma": {"mlp": "GELU"},
    "gemma2": {"mlp": "GELU"},
    "gemma3": {"mlp": "GELU"},
    "gpt2": {"norm": "no RMSNorm", "mlp": "no gated MLP"},
    "mixtral": {"mlp": "experts is left alone", "loss": "experts"},
    "gpt-oss": {"mlp": "experts is left alone", "loss": "experts", "rotary": "other pairs"},
    "llama4": {"mlp": "experts is left alone", "loss": "experts", "attention": "create_chunked_causal_mask"},
    "cohere": {"norm": "subtracts the mean", "rotary": "other pairs", "loss": "logits are scaled"},
}


@families
def test_what_is_replaced(family):
    report = fastllm.patch(make(family))
    left = LEFT.get(family, {})
    assert {f.part for f in report.left} == set(left)
    for found in report.left:
        assert left[found.part] in found.note
    none_there = {"rotary"} if family in ("gpt2", "llama4") else set()
    assert {f.part for f in report.replaced} == ALL - set(left) - none_there
    assert all(f.note in str(report) for f in (*report.replaced, *report.left))


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_as_near_to_float64(family, dtype):
    batch, exact_model = some_text(), make(family).double()
    reference = loss_and_gradients(exact_model, batch)
    with fastllm.patched(exact_model):  # transformers' norms compute in float32 even here, ours in float64
        exact = loss_and_gradients(exact_model, batch)
    for mine, theirs in zip(exact, reference, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-5)
    model = make(family).to(dtype)
    theirs = loss_and_gradients(model, batch)
    with fastllm.patched(model):
        ours = loss_and_gradients(model, batch)
    assert_as_near(ours, theirs, exact, dtype)


@families
def test_unpatch_restores_every_attribute(family):
    model, other = make(family), make(family)
    other.config = model.config  # a configuration that two models share
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    with torch.no_grad():
        expected = model(**some_text())
        fastllm.patch(model)
        assert model.config is model.get_decoder().config is other.config
        assert torch.equal(other(**some_text()).logits, expected.logits)
        fastllm.unpatch(model)
        assert torch.equal(model(**some_text()).logits, expected.logits)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[k] is v for k, v in before[name].items()), name


def test_patched_restores_after_an_error():
    model = make("llama")
    with pytest.raises(IndexError), fastllm.patched(model):
        model(torch.tensor([[10**6]]))
    assert type(model) is transformers.LlamaForCausalLM
    assert fastllm.patch(model).replaced


def test_checkpoints_are_those_of_the_unpatched_model(tmp_path):
    model, plain = make("qwen3"), make("qwen3")
    fastllm.patch(model)
    model.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").train()
    torch.testing.assert_close(loaded(**some_text()).loss, model(**some_text()).loss)


def test_changes_of_the_configuration_outlive_the_patch():
    model = make("llama")
    with fastllm.patched(model):
        model.resize_token_embeddings(200)
        model.model.config.use_cache = False
        assert model(**some_text()).loss.isfinite()
    assert model.config.vocab_size == 200
    assert model.config.use_cache is False


def test_parts():
    model = make("llama")
    with fastllm.patched(model, parts=("norm", "loss")) as report:
        assert {f.part for f in report.replaced} == {"norm", "loss"}
        assert type(model.model.layers[0].mlp) is LlamaMLP
    with pytest.raises(UserError, match="unknown parts norms; choose from norm, mlp"):
        fastllm.patch(model, parts=("norms",))


def test_errors():
    with pytest.raises(UserError, match="Linear is no transformers model"):
        fastllm.patch(nn.Linear(2, 2))
    model = make("llama")
    with pytest.raises(UserError, match="not patched"):
        fastllm.unpatch(model)
    fastllm.patch(model)
    with pytest.raises(UserError, match="patched already"):
        fastllm.patch(model, parts=("norm",))
    with pytest.raises(UserError, match="patched already"):
        fastllm.patch(model, unknown="probe")
    mine = model.forward
    model.forward = lambda *args, **kwargs: mine(*args, **kwargs)
    with pytest.raises(UserError, match="forward of a LlamaForCausalLM was replaced after patch"):
        fastllm.unpatch(model)
    assert type(model.model.norm) is not LlamaRMSNorm, "a failed unpatch leaves all as it was"
    del model.forward
    fastllm.unpatch(model)
    with pytest.raises(UserError, match='unknown=\'try\'; choose from "leave" and "probe"'):
        fastllm.patch(model, unknown="try")


# ---- what is not in the table ----


class CentredNorm(LlamaRMSNorm):
    """By its name and attributes a norm, but it centres."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OwnNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class GatedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class OwnMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ClampedMLP(LlamaMLP):
    """As GLM-5's: small numbers never meet the limit."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(-10.0, 10.0)
        return self.down_proj(self.act_fn(gate) * up)


class DroppingMLP(LlamaMLP):
    """As Seed-OSS's: in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class DroppingChildMLP(LlamaMLP):
    """Dropout in a module of its own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


class HalfMLP(LlamaMLP):
    """Something else in its own dtype alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dtype == torch.float32 else super().forward(x.clamp(-2, 2))


class Doubled(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            out.loss = 2 * self.loss_function(logits=out.logits, labels=labels, vocab_size=self.config.vocab_size)
        return out


def with_classes(*, norm: type = LlamaRMSNorm, mlp: type = LlamaMLP, dtype: torch.dtype = torch.float32) -> Any:
    model = make("llama", num_hidden_layers=1)
    model.model.norm.__class__ = norm
    old = model.model.layers[0].mlp
    model.model.layers[0].mlp = mlp(model.config)
    model.model.layers[0].mlp.load_state_dict(old.state_dict())
    return model.to(dtype)


def notes(report: fastllm.huggingface.patching.PatchReport) -> dict[str, str]:
    return {f.kind: f.note for f in report.left}


def test_unknown_classes_are_left_and_reported():
    model = with_classes(norm=OwnNorm, mlp=OwnMLP)
    left = notes(fastllm.patch(model))
    assert left == dict.fromkeys(("OwnNorm", "OwnMLP"), 'not in the table; patch(model, unknown="probe") tries it')
    fastllm.unpatch(model)
    with fastllm.patched(model, unknown="probe") as report:
        assert not report.left
        assert {"OwnNorm", "OwnMLP"} <= {f.kind for f in report.replaced}


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        ({"norm": CentredNorm}, "no RMSNorm"),
        ({"norm": GatedNorm}, "no RMSNorm"),
        ({"mlp": ClampedMLP}, "at inputs of about 100 it differs"),
        ({"mlp": DroppingMLP}, "drops out in training"),
        ({"mlp": DroppingChildMLP}, "drops out in training"),
        ({"mlp": HalfMLP, "dtype": torch.bfloat16}, "it differs"),
    ],
    ids=lambda value: next(iter(value.values())).__name__ if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_what_computes_something_else(classes, why, training):
    model = with_classes(**classes).train(training)
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    left = notes(fastllm.patch(model, unknown="probe"))
    assert list(left) == [next(iter(classes.values())).__name__]
    assert why in next(iter(left.values()))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_listed_class_that_computes_something_else_is_left(monkeypatch):
    """As in a version of transformers that changed it."""
    monkeypatch.setattr(LlamaMLP, "forward", ClampedMLP.forward)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: x * self.weight)
    left = notes(fastllm.patch(make("llama")))
    assert left.keys() == {"LlamaMLP", "LlamaRMSNorm"}
    assert all("in this version of transformers, it computes something else" in note for note in left.values())


def test_another_activation_in_the_configuration():
    left = notes(fastllm.patch(make("llama", hidden_act="gelu")))
    assert left.keys() == {"LlamaMLP"}
    assert "as configured here" in left["LlamaMLP"]
    assert "GELU" in left["LlamaMLP"]


def test_another_loss_is_left():
    model = make("llama")
    model.__class__ = Doubled
    expected = loss_and_gradients(model, some_text())
    report = fastllm.patch(model, unknown="probe")
    assert notes(report).keys() == {"Doubled"}
    for mine, theirs in zip(loss_and_gradients(model, some_text()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("surroundings", ["default dtype", "autocast", "meta", "no backend"])
def test_what_the_caller_has_set_makes_no_difference(surroundings):
    model = make("llama", num_hidden_layers=1)
    with contextlib.ExitStack() as stack:
        if surroundings == "default dtype":
            torch.set_default_dtype(torch.bfloat16)
            stack.callback(torch.set_default_dtype, torch.float32)
        elif surroundings == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        elif surroundings == "meta":
            stack.enter_context(torch.device("meta"))
        else:
            stack.enter_context(use_backend("triton"))
        assert not fastllm.patch(model).left


@torch.no_grad()
def test_attention_in_chunks_is_left():
    """transformers' mask would say so, and ours does not: Llama 4's layers see their own chunk of tokens alone."""
    model = make("llama4").eval()
    tokens = some_text()["input_ids"]
    expected = model(tokens).logits
    with fastllm.patched(model) as report:
        assert {f.note for f in report.left if f.part == "attention"} == {
            "the model around it makes masks by create_chunked_causal_mask"
        }
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


class OwnAttention(LlamaAttention):
    """Reads the mask by itself."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        assert attention_mask is None or attention_mask.dim() == 4
        return hidden_states, None


def test_attentions_that_share_a_mask_are_all_replaced_or_none():
    model = make("llama")
    model.model.layers[1].self_attn.__class__ = OwnAttention
    with fastllm.patched(model) as report:
        notes = {f.kind: f.note for f in report.left if f.part == "attention"}
        assert set(notes) == {"LlamaAttention", "OwnAttention"}
        assert "share a mask" in notes["LlamaAttention"]
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[0, :5] = 0
        assert model(**some_text(), attention_mask=mask).loss.isfinite()


def test_dropout_and_hooks_are_left():
    model = make("llama", attention_dropout=0.1)
    norm = model.model.norm
    norm.forward = norm.forward  # as accelerate's hooks do
    left = {(f.part, f.note) for f in fastllm.patch(model).left}
    assert left == {
        ("attention", "the kernel has no dropout, its configuration says 0.1"),
        ("norm", "its forward was replaced by something else (a hook?)"),
    }


# ---- the loss ----


def test_logits_only_when_somebody_asks():
    model, batch = make("gemma2"), some_text()
    plain = model(**batch)
    fastllm.patch(model)
    assert model(**batch).logits is None
    assert len(model(**batch, return_dict=False)) == len(model(**batch).to_tuple())
    for ask in ({"skip_logits": False}, {"logits_to_keep": 24}, {"labels": None}):
        torch.testing.assert_close(model(**(batch | ask)).logits, plain.logits, rtol=1e-4, atol=1e-5)
    model.eval()
    torch.testing.assert_close(model(**batch).logits, plain.logits, rtol=1e-4, atol=1e-5)
    skipped = model(**batch, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, plain.loss)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(48).view(2, 24)},
    ],
    ids=str,
)
def test_options_of_the_loss(options):
    model, batch = make("llama"), some_text()
    if "ignore_index" in options:
        batch["labels"][batch["labels"] == -100] = 5
    expected = model(**batch, **options).loss
    fastllm.patch(model)
    assert model(**batch, **options).logits is None
    torch.testing.assert_close(model(**batch, **options).loss, expected)


def test_positional_labels_and_the_signature():
    model, batch = make("llama"), some_text()
    expected, signature = model(**batch).loss, inspect.signature(model.forward)
    fastllm.patch(model)
    assert inspect.signature(model.forward) == signature  # Trainer chooses a data set's columns by it
    place = list(signature.parameters).index("labels")
    arguments = [batch["input_ids"], *[None] * (place - 1), batch["labels"]]
    torch.testing.assert_close(model(*arguments).loss, expected)


def test_a_loss_of_the_users_own():
    model = make("llama")
    model.loss_function = lambda logits, labels, **kwargs: F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    batch = some_text()
    expected = model(**batch).loss
    fastllm.patch(model)
    torch.testing.assert_close(model(**batch).loss, expected)
