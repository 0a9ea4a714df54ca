"""Models from Hugging Face folders: config.json, safetensors and tokenizer.json.

The GPT covers four layouts of transformers: Llama, Mistral (a window), Qwen2 (biases) and Qwen3 (normalised queries
and keys, a window).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig, built
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.gpt import GPT
from ..model.rope import attention_factor
from ..model.weights import load_weights
from ..run_dir import check_tokenizer

CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
TOKENIZER, WEIGHTS = "tokenizer.json", "model.safetensors"
# The layouts, and transformers' defaults for keys that config.json may omit, where the layouts differ.
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}


def from_pretrained(
    path: str | Path,
    *,
    max_seq_len: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """The model in a Hugging Face folder, in eval mode.

    Args:
        path: a folder with config.json and safetensors, in one file or several, of a Llama, Mistral, Qwen2 or Qwen3.
        max_seq_len: tokens that the model sees at once, which sets the size of rotary tables and key/value caches;
            None: what its configuration says, which is also the most.
        dtype: of the weights; None: that of the files.
        device: where the model is placed.

    Raises:
        UserError: there is no such folder, its configuration has something that the GPT does not have, or the weights
            don't fit the configuration. Pickled weights are not read.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no folder {path} (hf download NAME --local-dir FOLDER gets a model from the Hub)")
    config = model_config(path / CONFIG)
    if max_seq_len is not None:
        if not 0 < max_seq_len <= config.max_seq_len:
            limit = f"{config.max_seq_len} of {path / CONFIG}"
            raise UserError(f"max_seq_len must be from 1 to the {limit}, it is {max_seq_len}")
        config = replace(config, max_seq_len=max_seq_len)
    return load_weights(config, *_weight_files(path), dtype=dtype).to(device).eval()


def load(path: Path, device: torch.device | str) -> tuple[GPT, Tokenizer]:
    """The model in eval mode, and its tokenizer."""
    if not (path / TOKENIZER).is_file():
        raise UserError(f"{path} has no {TOKENIZER}")
    found = [_json(path / name).get("eos_token_id") for name in (GENERATION, CONFIG) if (path / name).is_file()]
    eos: int | list[int] = next((e for e in found if e is not None), [])
    tokenizer = Tokenizer.load(path / TOKENIZER, eos_ids=(eos,) if isinstance(eos, int) else tuple(eos))
    check_tokenizer(tokenizer, path / TOKENIZER, *_weight_files(path))
    model = from_pretrained(path, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:  # fewer is fine: models round their vocabulary up
        raise UserError(
            f"{path}: {TOKENIZER} has {tokenizer.vocab_size} tokens, "
            f"but vocab_size in {CONFIG} is {model.config.vocab_size}"
        )
    return model, tokenizer


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        names = sorted(set(_json(path / INDEX).get("weight_map", {}).values()))
        outside = [name for name in names if Path(name).name != name]
        if not names or outside:
            raise UserError(f"{path / INDEX} names no files beside it")
        return [path / name for name in names]
    pickled = any(path.glob("pytorch_model*.bin"))
    hint = "; its weights are pickled: have transformers load and save_pretrained them first" if pickled else ""
    raise UserError(f"{path} has no {WEIGHTS}{hint}")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


# ---- the configuration, in ----


def model_config(path: Path) -> ModelConfig:
    """The GPT's configuration for a config.json, of transformers 5 or older; UserError where there is none."""
    content = _json(path)
    kind = content.get("model_type")
    if kind not in DEFAULTS:
        raise UserError(f"{path}: model_type is {kind!r}; fastllm's GPT reads {', '.join(DEFAULTS)}")
    given = {key: value for key, value in {**DEFAULTS[kind], **content}.items() if value is not None}

    def must(key: str, *allowed: Any) -> None:
        if given.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {given[key]!r}, which fastllm's GPT does not have")

    must("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        must(key, False)
    must("partial_rotary_factor", 1.0)
    needed = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings",
    )  # fmt: skip
    missing = [key for key in needed if type(given.get(key)) is not int or given[key] < 1]
    if missing:
        raise UserError(f"{path} must say how large these are: {', '.join(missing)}")
    heads, dim = given["num_attention_heads"], given["hidden_size"]
    head_dim = given.get("head_dim", dim // heads)
    return built(
        path,
        ModelConfig,
        vocab_size=given["vocab_size"],
        max_seq_len=given["max_position_embeddings"],
        dim=dim,
        layers=given["num_hidden_layers"],
        heads=heads,
        kv_heads=given.get("num_key_value_heads", heads),
        attention_dim=0 if head_dim * heads == dim else head_dim * heads,
        ffn_dim=given["intermediate_size"],
        window=_window(path, kind, given),
        norm_eps=given.get("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        tie_embeddings=given.get("tie_word_embeddings", False),
        **_rope(path, given),
    )


def _window(path: Path, kind: str, given: dict[str, Any]) -> int:
    if kind == "llama":
        return 0
    window = given.get("sliding_window", 0)
    if kind == "mistral":
        return window
    layers, first = given["num_hidden_layers"], given.get("max_window_layers", 28)
    types = given.get("layer_types") or ["full_attention"] * min(first, layers) + ["sliding_attention"] * (
        layers - first
    )
    if not given.get("use_sliding_window", False) or not window or set(types) == {"full_attention"}:
        return 0
    if set(types) != {"sliding_attention"}:
        raise UserError(f"{path}: some layers have a window and some have none; fastllm's GPT has one kind of layer")
    return window


# Further keys of each kind of scaling, and the only values that the GPT has.
ROPE_FIXED = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
}


def _rope(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields, from ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``.

    Where both are present, transformers reads the older ones.
    """
    rope = {k: v for k, v in (given.get("rope_scaling") or given.get("rope_parameters") or {}).items() if v is not None}
    theta, kind = rope.pop("rope_theta", given.get("rope_theta", 10_000.0)), rope.pop("rope_type", rope.get("type"))
    rope.pop("type", None)
    kind = kind or "default"
    if kind not in ROPE_FIXED:
        raise UserError(f"{path}: rope_type is {kind!r}; fastllm's GPT has {', '.join(ROPE_FIXED)}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is not 1, which fastllm's GPT does not have")
    fields, fixed = {"rope_theta": theta}, dict(ROPE_FIXED[kind])
    if kind != "default":
        if "factor" not in rope:
            raise UserError(f"{path}: rope scaling {kind!r} lacks its factor")
        fields |= {"rope_scaling": kind, "rope_factor": rope.pop("factor")}
    if kind in ("llama3", "yarn"):
        original = rope.pop("original_max_position_embeddings", given["max_position_embeddings"])
        fields["rope_original_max_seq_len"] = given.get("original_max_position_embeddings", original)
    if kind == "yarn":
        fixed["attention_factor"] = attention_factor(built(path, ModelConfig, **fields))
    for key, value in rope.items():
        if key not in fixed or abs(value - fixed[key]) > 1e-6:
            raise UserError(f"{path}: {key} of rope scaling {kind!r} is {value}, which fastllm's GPT does not have")
    return fields
