"""Models from GGUF files of the llama, qwen2 and qwen3 architectures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..input_files import one_line, open_regular
from ..model.gpt import GPT
from ..model.safetensors_header import Entry
from ..model.weights import assembled, check_finite, check_fit
from .header import Header, read_header
from .model_config import ROPE_FACTORS, model_config
from .tensors import FLOATS, read_from
from .tokenizer import read_tokenizer

# The tensors of a model and of its layers in both worlds.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_THEIR_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,8})\.)?(\w+)\.(weight|bias)")


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer]:
    """The model in a GGUF file, in eval mode, and its tokenizer with the chat template.

    ``dtype``: of the weights; None: that of the file's matrices, float32 where they are quantised.
    """
    header = read_header(path)
    config = model_config(header)
    tokenizer = read_tokenizer(header)
    if tokenizer.vocab_size > config.vocab_size:  # fewer is fine: models round their vocabulary up
        raise UserError(
            f"{header.path}: tokenizer.ggml.tokens has {tokenizer.vocab_size} tokens, "
            f"but token_embd.weight is of {config.vocab_size}"
        )
    return load_weights(header, config, dtype).to(device).eval(), tokenizer


def load_weights(header: Header, config: ModelConfig, dtype: torch.dtype | None = None) -> GPT:
    """The GPT on the CPU with the weights of the file."""
    dtype = dtype or _dtype(header)
    theirs = {_our_name(name): name for name in header.tensors if name != ROPE_FACTORS}
    entries = {ours: Entry(dtype, header.tensors[name].shape) for ours, name in theirs.items()}
    check_fit(config, entries, header.path, dtype, lambda name: one_line(theirs.get(name) or _their_name(name)))
    heads = _permuted_heads(header, config)
    tensors: dict[str, Tensor] = {}
    with open_regular(header.path, "the model ") as file:
        for ours, name in theirs.items():
            tensor = read_from(file, header, name, dtype)
            check_finite(tensor, name, header.path)
            kind = name.split(".")[-2]
            tensors[ours] = _unpermuted(tensor, heads[kind]) if kind in heads else tensor
    return assembled(config, tensors)


def _dtype(header: Header) -> torch.dtype:
    """That of all matrices where it is one; vectors are float32 in any file."""
    kinds = {info.type.name for info in header.tensors.values() if len(info.shape) > 1}
    return FLOATS.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _our_name(name: str) -> str:
    """What the GPT calls a tensor of the file; a name that it does not have where it has none like it."""
    found = _THEIR_NAME.fullmatch(name)
    if not found or found[2] not in NAMES:
        return f"unknown {name}"
    layer, kind, last = found.groups()
    return f"{NAMES[kind]}.{last}" if layer is None else f"model.layers.{layer}.{NAMES[kind]}.{last}"


def _their_name(name: str) -> str:
    """What a file calls a tensor of the GPT."""
    parts = name.removeprefix("model.layers.").split(".", 1) if name.startswith("model.layers.") else ["", name]
    stem, _, last = parts[1].rpartition(".")
    kinds = {ours: kind for kind, ours in NAMES.items()}
    if stem not in kinds:
        return name
    return f"blk.{parts[0]}.{kinds[stem]}.{last}" if parts[0] else f"{kinds[stem]}.{last}"


def _permuted_heads(header: Header, config: ModelConfig) -> Mapping[str, int]:
    """The heads of each kind of tensor whose rows llama.cpp's converter has put in another order."""
    if header.metadata["general.architecture"] != "llama":
        return {}
    return {"attn_q": config.heads, "attn_k": config.kv_heads}


def _unpermuted(tensor: Tensor, heads: int) -> Tensor:
    """Rotary pairs that lie side by side, as llama.cpp wants them, put half a head apart."""
    head = tensor.shape[0] // heads
    return tensor.view(heads, head // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
