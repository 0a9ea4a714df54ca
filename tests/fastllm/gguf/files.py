"""Small GGUF files, written by llama.cpp's own writer, of random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from fastllm.config import ModelConfig
from fastllm.data.tokenizer import EOS_TOKEN, Tokenizer
from fastllm.gguf.load import NAMES
from fastllm.model.gpt import GPT
from tests.fastllm.huggingface.folders import randomised

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER = Tokenizer.train(["def add(a, b):\n    return a + b  # 1234 é 日本\n" * 20], 400, chat=True)
# Rows of 256 values are what all types can store; transformers takes Qwen 3's heads to be of 128.
SIZES: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size, "max_seq_len": 96, "dim": 256, "layers": 2, "heads": 4, "kv_heads": 2,
    "ffn_dim": 512, "rope_theta": 5000.0, "norm_eps": 0.01,
}  # fmt: skip
CONFIGS = {
    "llama": ModelConfig(**SIZES),
    "llama, untied": ModelConfig(**SIZES, tie_embeddings=False),
    "qwen2": ModelConfig(**SIZES, qkv_bias=True),
    "qwen3": ModelConfig(**SIZES, qk_norm=True, attention_dim=512),
}
# Types that the writer can't make: where each block has numbers of two bytes, its scales, and for which ones the random
# values are about as large as a model's weights.
SCALES: dict[str, tuple[float, tuple[int, ...]]] = {
    "Q2_K": (5e-3, (80, 82)), "Q3_K": (1.5e-3, (108,)), "Q4_K": (2e-4, (0, 2)), "Q5_K": (1e-4, (0, 2)),
    "Q6_K": (7e-5, (208,)),
}  # fmt: skip


def model_of(config: ModelConfig) -> GPT:
    return randomised(GPT(config))


def write(
    path: Path,
    model: GPT,
    tokenizer: Tokenizer | None = TOKENIZER,
    *,
    kind: str = "F32",
    keys: dict[str, Any] | None = None,
    change: Callable[[dict[str, Tensor]], None] | None = None,
) -> Path:
    """Write ``model`` as llama.cpp's converter would, its matrices of the type ``kind``.

    Args:
        path: the file.
        model: of the architecture that its configuration makes it.
        tokenizer: None: there is none in the file.
        kind: the type of the matrices.
        keys: metadata that replaces what the model has, or with None is left out.
        change: what happens to the tensors before, by their names in the file.
    """
    config, arch = model.config, architecture(model.config)
    metadata: dict[str, Any] = {
        f"{arch}.context_length": config.max_seq_len,
        f"{arch}.embedding_length": config.dim,
        f"{arch}.block_count": config.layers,
        f"{arch}.feed_forward_length": config.ffn_dim,
        f"{arch}.attention.head_count": config.heads,
        f"{arch}.attention.head_count_kv": config.kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.freq_base": config.rope_theta,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if tokenizer is not None:
        metadata |= tokenizer_keys(tokenizer)
    writer = GGUFWriter(path, arch)
    for key, value in (metadata | (keys or {})).items():
        add(writer, key, value)
    tensors = {their_name(name): permuted(name, t, config, arch) for name, t in model.state_dict().items()}
    if change:
        change(tensors)
    for name, tensor in tensors.items():
        stored = GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        writer.add_tensor(name, quantized(tensor.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def architecture(config: ModelConfig) -> str:
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def tokenizer_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    content = json.loads(tokenizer.backend.to_str())
    tokens: list[str] = [tokenizer.backend.id_to_token(i) for i in range(tokenizer.vocab_size)]
    special = {entry["content"] for entry in content["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index(EOS_TOKEN),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def their_name(name: str) -> str:
    names = {ours: theirs for theirs, ours in NAMES.items()}
    prefix, rest = "", name
    if name.startswith("model.layers."):
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        prefix = f"blk.{number}."
    stem, _, last = rest.rpartition(".")
    return f"{prefix}{names[stem]}.{last}"


def permuted(name: str, tensor: Tensor, config: ModelConfig, arch: str) -> Tensor:
    """As the converter has it for Llama: halves of a head are interleaved."""
    heads = config.heads if "q_proj" in name else config.kv_heads
    if arch != "llama" or not ("q_proj" in name or "k_proj" in name):
        return tensor
    return tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def quantized(values: np.ndarray, stored: GGMLQuantizationType) -> np.ndarray:
    """``values`` in the type ``stored``; random blocks where the writer can't make them."""
    if stored.name not in SCALES:
        return gguf.quants.quantize(values, stored)
    block, size = gguf.GGML_QUANT_SIZES[stored]
    random = np.random.default_rng(values.shape[0])
    blocks = random.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    scale, places = SCALES[stored.name]
    for place in places:
        scales = random.uniform(scale / 2, scale, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(values.shape[0], -1)


def same_weights(a: GPT, b: GPT) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())
