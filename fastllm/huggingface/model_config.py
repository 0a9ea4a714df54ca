"""The GPT's configuration for a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ModelConfig, built
from ..errors import UserError
from ..input_files import MAX_SIZE, Keys, one_line, read_json, shown
from ..model.rope import attention_factor

# The layouts, and transformers' defaults for keys that config.json may omit, where the layouts differ.
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}


def model_config(path: Path) -> ModelConfig:
    """The GPT's configuration for a config.json, of transformers 5 or older; UserError where there is none."""
    content = read_json(path)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise UserError(f"{path}: model_type is {shown(kind)}; fastllm's GPT reads {', '.join(DEFAULTS)}")
    keys = Keys(path, {**DEFAULTS[kind], **content})
    given = keys.values

    def must(key: str, *allowed: Any) -> None:
        if given.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {shown(given[key])}, which fastllm's GPT does not have")

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
    vocab_size, dim, ffn_dim, layers, heads, max_seq_len = map(keys.integer, needed)
    head_dim = keys.integer("head_dim", max(dim // heads, 1))
    if heads * head_dim > MAX_SIZE:
        raise UserError(f"{path}: num_attention_heads ({heads}) times head_dim ({head_dim}) is more than {MAX_SIZE}")
    return built(
        path,
        ModelConfig,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=keys.integer("num_key_value_heads", heads),
        attention_dim=0 if head_dim * heads == dim else head_dim * heads,
        ffn_dim=ffn_dim,
        window=_window(keys, kind, layers),
        norm_eps=keys.number("rms_norm_eps", 1e-6, least=0, most=1),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        tie_embeddings=keys.boolean("tie_word_embeddings"),
        **_rope(keys, max_seq_len),
    )


def _window(keys: Keys, kind: str, layers: int) -> int:
    if kind == "llama":
        return 0
    window = keys.integer("sliding_window", 0, least=0)
    if kind == "mistral":
        return window
    first, types = keys.integer("max_window_layers", 28, least=0), keys.values.get("layer_types")
    if not types:
        types = ["full_attention"] * (first > 0) + ["sliding_attention"] * (layers > first)
    elif not isinstance(types, list) or len(types) != layers or not all(isinstance(kind, str) for kind in types):
        raise keys.wrong("layer_types", f"a list of {layers} strings")
    if not keys.boolean("use_sliding_window") or not window or set(types) == {"full_attention"}:
        return 0
    if set(types) != {"sliding_attention"}:
        raise UserError(
            f"{keys.path}: some layers have a window and some have none; fastllm's GPT has one kind of layer"
        )
    return window


# Further keys of each kind of scaling, and the only values that the GPT has.
ROPE_FIXED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
}


def _rope(keys: Keys, max_seq_len: int) -> dict[str, Any]:
    """The rotary fields, from ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``.

    Where both are present, transformers reads the older ones.
    """
    path, older = keys.path, keys.table("rope_scaling")
    rope = older if older.values else keys.table("rope_parameters")
    theta = (rope if "rope_theta" in rope.values else keys).number("rope_theta", 10_000.0, least=1)
    kind = rope.string("rope_type" if "rope_type" in rope.values else "type", "default")
    if kind not in ROPE_FIXED:
        raise UserError(f"{path}: rope_type is {shown(kind)}; fastllm's GPT has {', '.join(ROPE_FIXED)}")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is not 1, which fastllm's GPT does not have")
    fields: dict[str, Any] = {"rope_theta": theta}
    read, fixed = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}, dict(ROPE_FIXED[kind])
    if kind != "default":
        if "factor" not in rope.values:
            raise UserError(f"{path}: rope scaling {kind!r} lacks its factor")
        fields |= {"rope_scaling": kind, "rope_factor": rope.number("factor")}
        read.add("factor")
    if kind in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        fields["rope_original_max_seq_len"] = keys.integer(key, rope.integer(key, max_seq_len))
        read.add(key)
    if kind == "yarn":
        fixed["attention_factor"] = attention_factor(built(path, ModelConfig, **fields))
    _check_rest({key: value for key, value in rope.values.items() if key not in read}, fixed, kind, path)
    return fields


def _check_rest(values: Mapping[str, Any], fixed: Mapping[str, Any], kind: str, path: str | Path) -> None:
    """Raise UserError where a rope scaling says what the GPT does not have."""
    for key, value in values.items():
        wanted = fixed.get(key)
        near = isinstance(value, int | float) and wanted is not None and -MAX_SIZE < value < MAX_SIZE
        if not (near and abs(value - wanted) <= 1e-6):
            raise UserError(
                f"{path}: {one_line(key)} of rope scaling {kind!r} is {shown(value)}, which fastllm's GPT does not have"
            )
