"""Tiny models, with large weights, of every causal language model class of the installed transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 96
# What a configuration may call its sizes; those that it has are set.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "d_model": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_layers": 2, "n_heads": 4,
    "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8, "ffn_dim": 48, "n_inner": 48,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_token": 4, "num_expert_group": 1, "num_shared_experts": 1, "emb_dim": 32, "n_words": VOCAB,
    "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB,
    "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "unpadded_vocab_size": VOCAB,
    "sliding_window": 8, "attention_window": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "rotary_dim": 8,
}  # fmt: skip
OFF = ("dropout", "pdrop", "_drop", "layerdrop")  # rates: with them no two results are the same
LAYERS = ("layer_types", "block_types", "layers_block_type")  # a layer of each kind
MLA = {"num_key_value_heads": 4}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
# What a class needs beyond SIZES.
GIVEN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("AXK1ForCausalLM", "AXK2ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
         "DeepseekV32ForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM", "LongcatFlashForCausalLM",
         "MiniCPM3ForCausalLM", "YoutuForCausalLM", "KimiLinearForCausalLM", "BailingHybridForCausalLM"), MLA,
    ),
    "FalconH1ForCausalLM": {**MAMBA2, "mamba_d_ssm": 64},
    "BambaForCausalLM": {**MAMBA2, "attn_layer_indices": [1]},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "MinistralForCausalLM": {"head_dim": 8},
    "NemotronForCausalLM": {"head_dim": 8, "num_key_value_heads": 2},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_shared_experts": 1},
    "DeepseekV2ForCausalLM": {**MLA, "num_experts_per_tok": 4},
    "DoryForCausalLM": {
        "num_hidden_layers": 4, "layer_types": 2 * ["sliding_attention", "full_attention"],
        "n_input_layers": 1, "n_output_layers": 1,
    },
    "Dots3NoteForCausalLM": MLA,
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "Qwen4ExpForCausalLM": {"indexer_budget": 8, "indexer_compress_ratio": 4, "indexer_n_heads": 2,
                            "indexer_kv_heads": 1, "indexer_head_dim": 8},
    "XmodForCausalLM": {"default_language": "en_XX", "languages": ["en_XX"]},
    "ZambaForCausalLM": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "xLSTMForCausalLM": {"hidden_size": 128},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16, "chunk_size": 8},
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds": False, "num_buckets": 2},
    "ProphetNetForCausalLM": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "GraniteMoeHybridForCausalLM": {**MAMBA2, "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip


def config_of(kind: type[PreTrainedConfig], given: dict[str, Any]) -> PreTrainedConfig:
    default = kind()
    held = vars(default)
    sizes = {name: size for name, size in SIZES.items() if held.get(name) is not None}
    sizes |= {name: 0.0 for name, value in held.items() if any(w in name for w in OFF) and isinstance(value, float)}
    for name in kind.sub_configs or {}:
        if isinstance(held.get(name), PreTrainedConfig):
            sizes[name] = config_of(type(held[name]), given.get(name, {}))
    for name in LAYERS:
        if held.get(name) and not callable(held[name]):
            each = list(dict.fromkeys(held[name]))
            sizes[name] = each if len(each) > 1 else each * 2
            if "num_hidden_layers" in held:
                sizes["num_hidden_layers"] = len(sizes[name])
    if isinstance(held.get("mlp_layer_types"), list):
        each = list(dict.fromkeys(held["mlp_layer_types"]))
        sizes["mlp_layer_types"] = [each[i % len(each)] for i in range(sizes.get("num_hidden_layers", 2))]
    if held.get("is_decoder") is False and not held.get("is_encoder_decoder"):
        sizes["is_decoder"] = True
    return kind(**{**sizes, **{name: value for name, value in given.items() if name not in (kind.sub_configs or {})}})


CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {}
for _config, _classes in MODEL_FOR_CAUSAL_LM_MAPPING.items():
    for _class in _classes if isinstance(_classes, tuple) else (_classes,):
        CLASSES.setdefault(_class.__name__, (_config, _class))


def make(name: str, *, trained: bool = True) -> PreTrainedModel:
    """In evaluation mode, float32, on the CPU, the same at every call."""
    config_kind, kind = CLASSES[name]
    config = config_of(kind.config_class or config_kind, GIVEN.get(name, {}))
    config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind._from_config(config, dtype=torch.float32).eval()
    return train(model) if trained else model


def train(model: PreTrainedModel) -> PreTrainedModel:
    """Give it large weights, so that errors show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            drawn = 0.2 * torch.randn(p.shape, generator=generator)
            p.copy_(drawn if p.dim() > 1 else p + drawn)
    return model
