"""What is made of a patched model: copies, pickles, replicas; and what other models and threads see of it."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

import fastllm
from fastllm.errors import UserError
from tests.fastllm.huggingface.patching.models import loss_and_gradients, make, some_text

FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt-oss"])


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle, protocol 0": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "torch.save": saved_and_loaded,
}


@FAMILIES
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_patched_and_unpatched_by_itself(family, way):
    model = make(family)
    plain = loss_and_gradients(model, some_text())
    fastllm.patch(model)
    ours = loss_and_gradients(model, some_text())
    kinds, twin = [type(m) for m in model.modules()], COPIES[way](model)
    assert [type(m) for m in twin.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(twin, some_text()), ours, strict=True))
    fastllm.unpatch(twin)
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(twin, some_text()), plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model, some_text()), ours, strict=True))
    fastllm.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model, some_text()), plain, strict=True))


def test_a_copy_has_weights_of_its_own():
    model = make("llama")
    fastllm.patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert twin.eval()(some_text()["input_ids"]).logits.abs().max() == 0
    assert model.eval()(some_text()["input_ids"]).logits.abs().max() > 0


def test_a_copy_of_a_part_can_be_unpatched():
    model = make("llama")
    fastllm.patch(model)
    decoder = copy.deepcopy(model.model)
    fastllm.unpatch(decoder)
    assert type(decoder) is modeling_llama.LlamaModel
    assert type(decoder.layers[0].self_attn) is modeling_llama.LlamaAttention


def test_classes_keep_their_names():
    """Policies of FSDP, device maps and checkpoints find layers by them."""
    model = make("llama")
    before = [(type(m).__module__, type(m).__qualname__) for m in model.modules()]
    fastllm.patch(model)
    assert [(type(m).__module__, type(m).__qualname__) for m in model.modules()] == before
    assert isinstance(model, transformers.LlamaForCausalLM)


def test_replicas_of_data_parallel_use_their_own_weights():
    model = make("llama")
    fastllm.patch(model)
    replica = model.model.norm._replicate_for_data_parallel()
    replica._parameters["weight"] = torch.zeros(64)
    assert replica(torch.ones(1, 64)).abs().max() == 0


def replica_of(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """As nn.DataParallel makes one for another GPU: shallow copies of the modules, with tensors of their own."""
    made = {name: module._replicate_for_data_parallel() for name, module in model.named_modules()}
    for name, module in made.items():
        prefix = f"{name}." if name else ""
        module._modules = {child: made[f"{prefix}{child}"] for child in module._modules}
        module._parameters = {}  # plain tensors, as gradients go to the original
        vars(module).update({p: weights.get(f"{prefix}{p}") for p in model.get_submodule(name)._parameters})
    return made[""]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "phi3"])
def test_a_whole_replica_computes_with_its_own_weights(family):
    model, other = make(family), make(family)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    tensors = {p: p.detach().requires_grad_() for p in other.parameters()}  # tied ones once
    weights = {name: tensors[p] for name, p in other.named_parameters(remove_duplicate=False)}
    expected = loss_and_gradients(other, some_text())
    fastllm.patch(model)
    loss = replica_of(model, weights)(**some_text()).loss
    grads = [g for g in torch.autograd.grad(loss, tensors.values(), allow_unused=True) if g is not None]
    for mine, their in zip([loss.detach(), *grads], expected, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_no_class_and_no_function_of_the_modeling_file_changes():
    model, other = make("llama"), make("llama")
    before = {name: value for name, value in vars(modeling_llama).items() if not name.startswith("_fastllm")}
    attributes = {name: dict(vars(kind)) for name, kind in before.items() if isinstance(kind, type)}
    state = pickle.dumps(other)
    with fastllm.patched(model):
        now = {name: value for name, value in vars(modeling_llama).items() if not name.startswith("_fastllm")}
        assert now == before
        assert {name: dict(vars(now[name])) for name in attributes} == attributes
        assert pickle.dumps(other) == state


def test_the_forward_of_an_attention_sees_its_globals_live(monkeypatch):
    model = make("llama")
    with fastllm.patched(model):
        monkeypatch.delattr(modeling_llama, "eager_attention_forward")
        with pytest.raises(NameError, match="eager_attention_forward"):
            model(**some_text())


def test_other_models_compute_what_they_did_in_other_threads_too():
    """Bit for bit, also when the patched model's attention runs at that very moment."""
    patched, plain = make("llama"), make("llama")
    expected = loss_and_gradients(plain, some_text())
    fastllm.patch(patched)
    ours = loss_and_gradients(patched, some_text())
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(plain, some_text()), expected, strict=True))
    inside, done, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        inside.wait(60)
        seen.append(loss_and_gradients(plain, some_text()))
        done.set()

    def pause(*_: Any) -> None:
        inside.set()
        assert done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    hook = patched.model.layers[0].self_attn.q_proj.register_forward_hook(pause)
    mine = loss_and_gradients(patched, some_text())
    hook.remove()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mine, ours, strict=True))


def test_a_class_put_above_a_patched_one_must_go_first():
    """As fully_shard puts one: what it does would be lost."""
    model = make("llama")
    fastllm.patch(model)
    norm = model.model.norm
    mine = type(norm)
    norm.__class__ = type("FSDPLlamaRMSNorm", (mine,), {})
    with pytest.raises(UserError, match="class of a LlamaRMSNorm was replaced after patch"):
        fastllm.unpatch(model)
    norm.__class__ = mine
    fastllm.unpatch(model)
    assert type(norm) is modeling_llama.LlamaRMSNorm
