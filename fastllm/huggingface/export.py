"""Write models as Hugging Face folders, which transformers and vLLM read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig
from ..data.chat_template import TEMPLATE
from ..errors import UserError
from ..files import atomic_folder
from ..gguf import load as gguf
from ..run_dir import GENERATION, load_run
from .load import CONFIG, TOKENIZER
from .model_config import ROPE_FIXED


def export(
    run: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a trained model as a Hugging Face folder, which transformers' Auto classes and vLLM load.

    Args:
        run: the run folder, or a GGUF file.
        out: the folder to make; it appears complete or not at all.
        dtype: of the weights; None: unchanged, which is float32 after training.
        max_shard_size: larger weights are split into several files.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` is not empty, ``run`` is not a complete run or is a Hugging Face folder itself, or no layout
            of transformers has what the model has.
    """
    from huggingface_hub import save_torch_state_dict  # slow to import

    out = Path(out)
    if not out.name:
        raise UserError(f"{out} is no name for a new folder")
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"can't write {out}: {error.strerror}") from None
    if taken:
        raise UserError(f"{out} is there already and not empty; choose another folder")
    if os.path.isfile(Path(run) / CONFIG):
        raise UserError(f"{run} is a Hugging Face folder already")
    if os.path.isfile(run):
        model, tokenizer = gguf.load(Path(run), "cpu", None)
    elif os.path.isdir(run):
        model, tokenizer = load_run(Path(run))
    else:
        raise UserError(f"there is no run folder {run}")
    model = model if dtype is None else model.to(dtype)
    weight_dtype = str(model.head_weight.dtype).removeprefix("torch.")
    ends: int | list[int] = tokenizer.eos_id if len(tokenizer.eos_ids) == 1 else list(tokenizer.eos_ids)
    special = {"bos_token_id": tokenizer.eos_id, "eos_token_id": ends}
    config = {**layout(model.config), "torch_dtype": weight_dtype, **special}
    text = tokenizer.backend.id_to_token(tokenizer.eos_id)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": text, "eos_token": text,
        "model_max_length": model.config.max_seq_len, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    with atomic_folder(out) as part:
        for name, content in ((CONFIG, config), (GENERATION, special), ("tokenizer_config.json", described)):
            (part / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if tokenizer.chat_template is not None:
            (part / TEMPLATE).write_text(tokenizer.chat_template.source, "utf-8")
        (part / TOKENIZER).write_text(tokenizer.backend.to_str(pretty=True), "utf-8")
        metadata = {"format": "pt", "tokenizer": tokenizer.fingerprint}
        save_torch_state_dict(model.state_dict(), part, max_shard_size=max_shard_size, metadata=metadata)
    return out


def layout(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the layout that fits ``config``, with keys that transformers 4 and 5 and vLLM know."""
    if config.qk_norm and config.qkv_bias:
        raise UserError("no Hugging Face layout has both model.qk_norm and model.qkv_bias")
    if config.attention_dim not in (0, config.dim) and config.qkv_bias:
        raise UserError("no Hugging Face layout has model.qkv_bias with a model.attention_dim that isn't model.dim")
    kind = "mistral" if config.window or config.dim % config.heads else "llama"  # Llama's must divide
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else kind
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    rope: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_original_max_seq_len:
        rope["original_max_position_embeddings"] = config.rope_original_max_seq_len
    rope |= {key: value for key, value in ROPE_FIXED.get(config.rope_scaling, {}).items() if key != "truncate"}
    keys = {
        "architectures": [f"{names[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling == "none" else rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
    }
    if kind != "llama":
        keys["sliding_window"] = config.window or None
    if kind in ("qwen2", "qwen3"):
        keys |= {"use_sliding_window": bool(config.window), "max_window_layers": 0 if config.window else config.layers}
    return keys
