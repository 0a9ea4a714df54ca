"""Ten training steps of a patched model against the unpatched one, with what people train with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fastllm
from tests import forked
from tests.fastllm.huggingface.patching import sharded_training
from tests.fastllm.huggingface.patching.models import assert_as_near, make, trained

FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])


@functools.cache
def exact(family: str) -> list[Tensor]:
    """In float64, where our ops are their specifications."""
    model = make(family).double()
    fastllm.patch(model)
    return trained(model)


def assert_trains_alike(
    family: str,
    dtype: torch.dtype = torch.float32,
    reference: Callable[[str], list[Tensor]] = exact,
    prepare: Callable[[Any], Any] = lambda model: model,
    **options: Any,
) -> None:
    theirs = trained(prepare(make(family)), **options)
    model = make(family)
    fastllm.patch(model)
    ours = trained(prepare(model), **options)
    assert_as_near(ours, theirs, reference(family), dtype)


@FAMILIES
def test_float32(family):
    assert_trains_alike(family)


@FAMILIES
def test_autocast(family):
    assert_trains_alike(family, torch.bfloat16, context=lambda: torch.autocast("cpu", torch.bfloat16))


@FAMILIES
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    def prepare(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    assert_trains_alike(family, prepare=prepare)


@FAMILIES
def test_compiled(family):
    def prepare(model: Any) -> Any:
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        return model

    assert_trains_alike(family, prepare=prepare)


def test_compiled_by_inductor():
    model = make("llama", num_hidden_layers=1)
    fastllm.patch(model)
    eager = trained(model, steps=2)
    model = make("llama", num_hidden_layers=1)
    fastllm.patch(model)
    torch._dynamo.reset()
    compiled = trained(model, steps=2, call=torch.compile(model, fullgraph=True))
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compile_keeps_the_kernels():
    """Under torch.compile too a plain batch takes our attention, not a mask of all pairs."""
    model = make("gemma2")
    fastllm.patch(model)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.arange(48).view(2, 24)
    step(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    with torch.profiler.profile() as profile:
        step(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    ran = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fastllm::")}
    layers = 2
    assert ran["fastllm::attention_forward"] == ran["fastllm::attention_backward"] == layers
    assert ran["fastllm::rms_norm_forward"] == ran["fastllm::rms_norm_backward"] == 4 * layers + 1
    assert ran["fastllm::linear_cross_entropy_with_gradients"] == 1


# ---- LoRA ----


def with_lora(model: Any, targets: Any = ("q_proj", "v_proj", "up_proj", "down_proj")) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for p in lora.parameters():
                if p.requires_grad:
                    p.normal_(std=0.05)
    return lora


@functools.cache
def exact_lora(family: str) -> list[Tensor]:
    lora = with_lora(make(family).double())
    fastllm.patch(lora)
    return trained(lora.double())


@FAMILIES
def test_lora_on_a_patched_model(family):
    assert_trains_alike(family, reference=exact_lora, prepare=with_lora)


@FAMILIES
def test_patching_a_model_that_has_lora(family):
    lora = with_lora(make(family))
    theirs = trained(lora)
    lora = with_lora(make(family))
    report = fastllm.patch(lora)
    assert {"norm", "rotary", "attention", "loss"} <= {f.part for f in report.replaced}
    assert_as_near(trained(lora), theirs, exact_lora(family), torch.float32)


def test_lora_on_the_head():
    """The head then computes more than its weight says: the loss goes by the logits."""
    targets = ("q_proj", "lm_head")
    theirs = trained(with_lora(make("llama"), targets))
    model = make("llama")
    fastllm.patch(model)
    ours = trained(with_lora(model, targets))
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


# ---- FSDP2, two processes ----


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    forked.run(sharded_training.run, (str(folder),), sharded_training.SIZE)
    return folder


@pytest.mark.parametrize("case", sharded_training.CASES)
def test_fsdp2_on_two_processes(sharded, case):
    """Shards that see the same batch train as one process does."""
    family = sharded_training.CASES[case][0]
    theirs = trained(make(family))
    for rank in range(sharded_training.SIZE):
        with contextlib.suppress(FileNotFoundError):
            pytest.fail((sharded / f"{case}.{rank}.error").read_text())
    ours = torch.load(sharded / f"{case}.pt", weights_only=True)
    assert_as_near(ours, theirs, exact(family), torch.float32)
