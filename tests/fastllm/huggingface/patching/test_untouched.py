"""What users do to the modules of a model, before patch and after it: no kernel passes over it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastllm
from tests.fastllm.huggingface.patching.models import loss_and_gradients, make, some_text


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


class ScaledLinear(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden_states)


class Quantized(Tensor):
    """A tensor subclass that computes in its own way, as those of torchao do."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return 0.5 * F.linear(args[0], args[1].detach().as_subclass(Tensor), *args[2:])
        return super().__torch_function__(func, types, args, kwargs)


def changed(x: Tensor) -> Tensor:
    """A norm behind it does not undo it."""
    return 0.5 * x + 0.3 * x.roll(1, -1)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: changed(out))


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (changed(args[0]), *args[1:]))


def backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, into, out: tuple(g if g is None else 0.5 * g for g in into))


def backward_pre_hook(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(lambda module, out: tuple(0.5 * g for g in out))


def own_forward(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda x: changed(before(x))


def own_class(module: nn.Module) -> None:
    before = type(module)
    module.__class__ = type("Own", (before,), {"forward": lambda self, x: changed(before.forward(self, x))})


def scaled_linear(module: nn.Module) -> None:
    module.__class__ = ScaledLinear


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Scaled())


def weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module)


def weight_norm_by_hook(module: nn.Module) -> None:
    nn.utils.weight_norm(module)
    with torch.no_grad():
        module.weight_g.mul_(0.5)


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.5)


def quantized(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantized), requires_grad=False)


def biased(module: nn.Module) -> None:
    module.bias = nn.Parameter(torch.linspace(-1, 1, module.weight.shape[0]))


ON_ANY = [hook, pre_hook, backward_hook, backward_pre_hook, own_forward, own_class]
ON_WEIGHTS = [parametrized, weight_norm_by_hook]
ON_LINEAR = [*ON_WEIGHTS, weight_norm, scaled_linear, pruned, quantized, biased]
LAYER = "model.layers.0."
CASES = [
    *(("lm_head", change) for change in (*ON_ANY, *ON_LINEAR)),
    *((f"{LAYER}mlp.act_fn", change) for change in ON_ANY),
    *((f"{LAYER}mlp.{name}", change) for name in ("gate_proj", "down_proj") for change in (hook, own_class, quantized)),
    *((f"{LAYER}{name}", hook) for name in ("mlp.up_proj", "self_attn.q_proj", "self_attn.k_norm", "self_attn.o_proj")),
    *((f"{LAYER}mlp", change) for change in (backward_hook, own_forward)),
    *(
        (f"{LAYER}input_layernorm", change)
        for change in (pre_hook, backward_hook, own_forward, own_class, parametrized)
    ),
    *((f"{LAYER}self_attn.q_norm", change) for change in (own_class, parametrized, weight_norm_by_hook)),
]


@functools.cache
def unchanged() -> list[Tensor]:
    return loss_and_gradients(make("qwen3", num_hidden_layers=1), some_text())


@pytest.mark.parametrize(("name", "change"), CASES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_change_of_a_module(name, change, when):
    batch = some_text()

    def results(patch: bool) -> list[Tensor]:
        model = make("qwen3", num_hidden_layers=1)
        changes = [lambda: change(model.get_submodule(name))]
        if patch:
            changes.insert(1 if when == "before" else 0, lambda: fastllm.patch(model))
        for each in changes:
            each()
        return loss_and_gradients(model, batch)

    plain = unchanged()
    ours, theirs = results(True), results(False)
    assert len(ours) == len(theirs)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)
    seen = len(plain) != len(theirs) or any(
        p.shape != t.shape or not torch.allclose(p, t, rtol=1e-3, atol=1e-4) for p, t in zip(plain, theirs, strict=True)
    )
    assert seen or change is weight_norm, "the change makes no difference, so this test sees none"


def test_a_hook_on_all_modules():
    model = make("llama")
    seen = []
    fastllm.patch(model)
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module))):
        logits = model(**some_text()).logits
    assert logits is not None
    assert sum(kind.__name__ == "SiLUActivation" for kind in seen) == 2


def test_the_loss_is_fused_again_once_the_hook_is_gone():
    model, batch = make("llama"), some_text()
    fastllm.patch(model)
    handle = model.lm_head.register_forward_hook(lambda module, args, out: 0.5 * out)
    assert model(**batch).logits is not None
    handle.remove()
    assert model(**batch).logits is None


def test_a_hook_on_the_head_sees_logits():
    model, batch, seen = make("llama"), some_text(), []
    fastllm.patch(model)
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(**batch).loss.backward()
    assert seen == [(2, 24, 131)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_activations_and_settings_of_an_mlp(when):
    def loss(patch: bool) -> Tensor:
        model = make("llama", num_hidden_layers=1)
        if patch and when == "after":
            fastllm.patch(model)
        model.model.layers[0].mlp.act_fn = nn.ReLU()
        if patch and when == "before":
            fastllm.patch(model)
        return model(**some_text()).loss

    torch.testing.assert_close(loss(True), loss(False))


def test_an_mlp_that_begins_to_drop_out():
    """Its rates are 0 when patch tries it."""
    from transformers import SeedOssConfig
    from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

    from fastllm.huggingface.patching.layers import find_mlp

    config = SeedOssConfig(hidden_size=8, intermediate_size=16, residual_dropout=0.0)
    mlp = SeedOssMLP(config).train()
    finding = find_mlp("", mlp, None)
    assert finding.replaced
    ((module, each),) = finding.steps
    forward = each.make(SeedOssMLP.forward, **dict(each.options))
    x = torch.randn(64, 8)
    torch.testing.assert_close(forward(module, x), SeedOssMLP.forward(module, x))
    module.residual_dropout = 1.0
    assert forward(module, x).abs().max() == 0


def test_softcap_is_read_when_it_is_used():
    model, batch = make("gemma2"), some_text()
    fastllm.patch(model)
    for softcap in (3.0, None, 1.0):
        model.config.final_logit_softcapping = softcap
        expected = model(**batch, skip_logits=False).loss
        torch.testing.assert_close(model(**batch).loss, expected)
        assert model(**batch).logits is None


def test_a_setting_of_the_loss_that_changes():
    from transformers import GraniteConfig, GraniteForCausalLM

    from tests.fastllm.huggingface.patching.models import SIZES

    model, batch = GraniteForCausalLM(GraniteConfig(**SIZES)).train(), some_text()
    fastllm.patch(model)
    model.config.logits_scaling = 7.0
    expected = model(**batch, skip_logits=False).loss
    torch.testing.assert_close(model(**batch).loss, expected)


# ---- peft ----

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["lm_head", "q_proj"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "all linear": {"target_modules": "all-linear"},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.filterwarnings("ignore")
def test_adapters(adapter, when, tied):
    def results(patch: bool) -> list[Tensor]:
        model = make("llama", num_hidden_layers=1, tie_word_embeddings=tied)
        if patch and when == "after":
            fastllm.patch(model)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[adapter]))
            for p in model.parameters():
                if p.requires_grad:
                    nn.init.normal_(p, std=0.1)
        if patch and when == "before":
            fastllm.patch(model)
        return loss_and_gradients(model.train(), some_text())

    for mine, their in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


# ---- dtypes ----


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_norms_in_float32_in_a_model_of_bfloat16(family):
    """As peft prepares a quantized model. The classes of norms differ in the dtype that they then give."""
    model = make(family).to(torch.bfloat16)
    norm = model.model.norm.float()
    x = torch.randn(3, 64).bfloat16()
    expected = norm(x)
    fastllm.patch(model)
    assert norm(x).dtype == expected.dtype
    torch.testing.assert_close(norm(x), expected)
