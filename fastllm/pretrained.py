"""Hugging Face folders in and out: config.json, safetensors and tokenizer.json, as transformers and vLLM read them.

Four of transformers' layouts are the GPT's own, but for small differences: Llama, Mistral (a window), Qwen2 (biases)
and Qwen3 (normalised queries and keys, a window).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .config import ModelConfig
from .errors import UserError
from .files import atomic_folder
from .model import GPT
from .rotary import attention_factor
from .tokenizer import Tokenizer
from .weights import load_weights

CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, WEIGHTS = "tokenizer.json", "tokenizer_config.json", "model.safetensors"
LAYOUTS = ("llama", "mistral", "qwen2", "qwen3")


def from_pretrained(
    path: str | Path,
    *,
    context: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """The model in a Hugging Face folder, in eval mode.

    Args:
        path: a folder with config.json and safetensors, in one file or several, of a Llama, Mistral, Qwen2 or Qwen3.
        context: tokens that the model shall see at once, at most what its configuration says (None: that); the rotary
            tables and the key/value cache are that long.
        dtype: of the weights; None: that of the files.
        device: where to put it.

    Raises:
        UserError: there is no such folder, its configuration has something that the GPT can't express, or the weights
            are not those of the configuration. Pickled weights are not read.
    """
    path = Path(path)
    config = model_config(path / CONFIG)
    if context is not None:
        if not 0 < context <= config.context:
            raise UserError(f"context must be from 1 to the {config.context} of {path / CONFIG}, it is {context}")
        config = ModelConfig(**{**vars(config), "context": context})
    return load_weights(config, *_weight_files(path), dtype=dtype).to(device).eval()


def load(path: Path, device: torch.device | str) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """As ``checkpoint.load_run``."""
    if not (path / TOKENIZER).is_file():
        raise UserError(f"{path} has no {TOKENIZER}")
    found = [_json(path / name).get("eos_token_id") for name in (GENERATION, CONFIG) if (path / name).is_file()]
    ends = next((e for e in found if e is not None), [])
    tokenizer = Tokenizer.load(path / TOKENIZER, ends=(ends,) if isinstance(ends, int) else tuple(ends))
    return from_pretrained(path, device=device), tokenizer, {"status": "finished"}


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
    """The GPT's configuration for a config.json, of transformers 5 or older."""
    given = {key: value for key, value in _json(path).items() if value is not None}
    kind = given.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"{path}: model_type is {kind!r}; fastllm's GPT reads {', '.join(LAYOUTS)}")

    def must(key: str, *allowed: Any) -> None:
        if given.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {given[key]!r}, which fastllm's GPT does not have")

    must("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        must(key, False)
    must("partial_rotary_factor", 1.0)
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if key not in given]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    heads, dim = given["num_attention_heads"], given["hidden_size"]
    head_dim = given.get("head_dim", 128 if kind == "qwen3" else dim // heads)
    return ModelConfig(
        vocab_size=given["vocab_size"],
        context=given.get("max_position_embeddings", 2048),
        dim=dim,
        layers=given["num_hidden_layers"],
        heads=heads,
        kv_heads=given.get("num_key_value_heads", heads),
        attention_dim=0 if head_dim * heads == dim else head_dim * heads,
        hidden_dim=given["intermediate_size"],
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


# What each kind of scaling may say beside its factor and original context, and the only values that it may have.
_ROPE_FIXED = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
}


def _rope(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields, from ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``."""
    rope = {k: v for k, v in (given.get("rope_parameters") or given.get("rope_scaling") or {}).items() if v is not None}
    theta, kind = rope.pop("rope_theta", given.get("rope_theta", 10_000.0)), rope.pop("rope_type", rope.get("type"))
    rope.pop("type", None)
    kind = kind or "default"
    if kind not in _ROPE_FIXED:
        raise UserError(f"{path}: rope_type is {kind!r}; fastllm's GPT has {', '.join(_ROPE_FIXED)}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is not 1, which fastllm's GPT does not have")
    if kind == "default":
        return {"rope_theta": theta}
    fields = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": rope.pop("factor", 1.0)}
    original = rope.pop("original_max_position_embeddings", given.get("max_position_embeddings", 2048))
    if kind != "linear":
        fields["rope_original_context"] = original
    fixed = dict(_ROPE_FIXED[kind])
    if kind == "yarn":
        fixed["attention_factor"] = attention_factor(ModelConfig(**fields))
    for key, value in rope.items():
        if key not in fixed or abs(value - fixed[key]) > 1e-6:
            raise UserError(f"{path}: {key} of rope scaling {kind!r} is {value}, which fastllm's GPT does not have")
    return fields


# ---- out ----


def export(
    run: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a trained model as a Hugging Face folder, which transformers' Auto classes and vLLM load.

    Args:
        run: the run folder (or a Hugging Face folder, to write it anew).
        out: the folder to make; it appears whole or not at all.
        dtype: of the weights; None: as they are, float32 after training.
        max_shard_size: weights beyond it are split into several files.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` is not empty, ``run`` is not a whole run, or no layout has what the model has.
    """
    from huggingface_hub import save_torch_state_dict

    from .checkpoint import load_run

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; choose another folder")
    model, tokenizer, _ = load_run(run)
    model = model if dtype is None else model.to(dtype)
    kept = str(model.head_weight.dtype).removeprefix("torch.")
    end = {
        "bos_token_id": tokenizer.end,
        "eos_token_id": tokenizer.ends[0] if len(tokenizer.ends) == 1 else tokenizer.ends,
    }
    config = {**layout(model.config), "torch_dtype": kept, **end}
    text = tokenizer.backend.id_to_token(tokenizer.end)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": text, "eos_token": text,
        "model_max_length": model.config.context, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    with atomic_folder(out) as part:
        for name, content in ((CONFIG, config), (GENERATION, end), (TOKENIZER_CONFIG, described)):
            (part / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        (part / TOKENIZER).write_text(tokenizer.backend.to_str(pretty=True), "utf-8")
        save_torch_state_dict(model.state_dict(), part, max_shard_size=max_shard_size, metadata={"format": "pt"})
    return out


def layout(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the layout that has what ``config`` has, in keys that transformers 4 and 5 and vLLM know."""
    if config.qk_norm and config.qkv_bias:
        raise UserError("no Hugging Face layout has both model.qk_norm and model.qkv_bias")
    kind = "mistral" if config.window else "llama"
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else kind
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    rope: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_original_context:
        rope["original_max_position_embeddings"] = config.rope_original_context
    rope |= {key: value for key, value in _ROPE_FIXED.get(config.rope_scaling, {}).items() if key != "truncate"}
    keys = {
        "architectures": [f"{names[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling == "none" else rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
    }
    if kind == "mistral" or config.window:
        keys["sliding_window"] = config.window
    if kind in ("qwen2", "qwen3"):
        keys |= {"use_sliding_window": bool(config.window), "max_window_layers": 0 if config.window else config.layers}
    return keys
