"""The model that post-training begins with: its vocabulary, its adapters, and what is written at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from .. import run_dir
from ..data.chat_template import CONFIG as TOKENIZER_CONFIG
from ..data.chat_template import TEMPLATE
from ..data.tokenizer import Tokenizer
from ..errors import UserError, pip_install, require_packages
from ..files import write_atomic
from ..model.gpt import GPT
from ..model.weights import assembled
from ..training.inference_model import Merge
from .config import LoraConfig

ADAPTER = "adapter"  # in a run folder: the adapters as peft writes them


def grow_vocabulary(model: GPT, tokenizer: Tokenizer, tokens: Sequence[str]) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer with the special ``tokens``; the same ones where all are there.

    The new rows of the embedding, and of a head of its own, are the mean of those of the tokens that were there: then
    a new token is about as likely as any other, and takes little from those that were likely (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models").
    """
    before = tokenizer.vocab_size
    new = [AddedToken(token, special=True, normalized=False) for token in tokens]
    if any(not token for token in tokens):
        raise UserError("a new token must not be empty")
    tokenizer.backend.add_special_tokens([token for token in new if token.content not in tokenizer.special_tokens])
    grown = Tokenizer(tokenizer.backend, tokenizer.eos_ids)
    grown.chat_template = tokenizer.chat_template
    if grown.vocab_size == before:
        return model, tokenizer
    # Models round their vocabulary up: the first new tokens take rows that are there and were never trained.
    rows = max(model.config.vocab_size, grown.vocab_size)
    state = dict(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            known, rest = state[name][:before], state[name][grown.vocab_size :]
            mean = known.float().mean(0).to(known.dtype)
            state[name] = torch.cat((known, mean.expand(grown.vocab_size - before, -1), rest))
    return assembled(replace(model.config, vocab_size=rows), state), grown


# ---- adapters ----


def add_adapters(model: GPT, config: LoraConfig, seed: int) -> None:
    """Put low-rank adapters into the layers of ``config.targets``, in place; all other parameters are frozen.

    At first they add nothing: one of the two matrices is 0. They are float32, whatever the model is: in bfloat16 most
    updates would be rounded away.
    """
    require_packages("lora.rank", "peft", install=pip_install("tune"))
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(config), model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        layer = name.removesuffix(".lora_magnitude_vector.default.weight")
        if layer != name:
            parameter.data = parameters[f"{layer}.base_layer.weight"].data.float().norm(dim=1)


def _peft_config(config: LoraConfig, base: str | None = None) -> Any:
    import peft

    alpha: Any = config.alpha or 2 * config.rank
    return peft.LoraConfig(
        r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, use_dora=config.dora,
        target_modules=list(config.targets), task_type="CAUSAL_LM", base_model_name_or_path=base,
    )  # fmt: skip


def adapter_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters in a state of the model, by the names that they have in peft's files."""
    found = {}
    for name, tensor in state.items():
        if "lora_" in name:
            name = name.replace(".default.weight", ".weight").replace(".default", "")
            found[f"base_model.model.{name}"] = tensor
    return found


@torch.no_grad()
def merged_state(
    state: Mapping[str, Tensor], config: LoraConfig, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state of a model with adapters as that of a plain one: each adapter is added to the weight of its layer.

    Of DoRA, the sum's rows are scaled to the magnitudes that were learnt. ``dtype``: of the sums; None: the base's.
    """
    scale = (config.alpha or 2 * config.rank) / config.rank
    merged = {}
    for name, tensor in state.items():
        if "lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            a, b = (state[f"{layer}.lora_{side}.default.weight"].float() for side in "AB")
            weight = tensor.float() + scale * (b @ a)
            if config.dora:
                magnitude = state[f"{layer}.lora_magnitude_vector.default.weight"].float()
                weight *= (magnitude / weight.norm(dim=1))[:, None]
            tensor = weight.to(dtype or tensor.dtype)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def merge_of(config: Any, dtype: torch.dtype) -> Merge | None:
    """What makes a plain model's tensors of those of a run with adapters; None: it has none."""
    return partial(merged_state, config=config.lora, dtype=dtype) if config.lora.rank else None


def save_adapter(folder: Path, state: Mapping[str, Tensor], config: LoraConfig, base: str) -> None:
    """Write the adapters as peft does: ``PeftModel.from_pretrained(transformers_model, folder)`` loads them."""
    from safetensors.torch import save

    path = folder / ADAPTER
    path.mkdir(exist_ok=True)
    tensors = {name: t.contiguous() for name, t in adapter_tensors(state).items()}
    write_atomic(path / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    values = _peft_config(config, base).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    write_atomic(path / "adapter_config.json", (json.dumps(plain, indent=2, default=str) + "\n").encode())


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


# ---- the tokenizer's files ----


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer, chat template, and the tokens that end generation."""
    assert tokenizer.chat_template is not None
    tokenizer.save(folder / run_dir.TOKENIZER)
    write_atomic(folder / TEMPLATE, tokenizer.chat_template.source.encode())
    files = {
        TOKENIZER_CONFIG: tokenizer.chat_template.variables,
        run_dir.GENERATION: {"eos_token_id": list(tokenizer.eos_ids)},
    }
    for name, content in files.items():
        write_atomic(folder / name, (json.dumps(content, indent=2) + "\n").encode())
