"""Hugging Face folders in and out, against transformers itself on small random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fastllm
from fastllm import checkpoint
from fastllm.cli import main
from fastllm.config import Config, ModelConfig, dump
from fastllm.errors import UserError
from fastllm.exporting import layout
from fastllm.generate import generate
from fastllm.model import GPT
from fastllm.pretrained import model_config
from fastllm.tokenizer import Tokenizer
from fastllm.weights import save_weights
from tests.numerics import assert_accurate

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 24}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Configuration class, and what it is given beyond SIZES.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {"head_dim": 32}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3, window": ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
}
theirs = pytest.mark.parametrize("name", THEIRS)
TOKENS = torch.randint(0, 300, (2, 80), generator=torch.Generator().manual_seed(0))
TOKENIZER = Tokenizer.train(["def add(a, b):\n    return a + b\n" * 20], 300)
SMALL = ModelConfig(vocab_size=TOKENIZER.vocab_size, context=96, dim=64, layers=2, heads=4, kv_heads=2, hidden_dim=96)
OURS = {
    "llama": SMALL,
    "llama, untied, yarn": replace(
        SMALL, tie_embeddings=False, rope_scaling="yarn", rope_factor=4.0, rope_original_context=24
    ),
    "llama, llama3": replace(SMALL, rope_scaling="llama3", rope_factor=4.0, rope_original_context=24),
    "mistral": replace(SMALL, window=8, rope_scaling="linear", rope_factor=2.0),
    "qwen2": replace(SMALL, qkv_bias=True),
    "qwen3": replace(SMALL, qk_norm=True, attention_dim=128),
    "qwen3, window": replace(SMALL, qk_norm=True, window=8),
}
ours = pytest.mark.parametrize("name", OURS)


@torch.no_grad()
def randomised(model: Any) -> Any:
    """Every weight counts, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() == 1 else p.shape[-1] ** -0.5))
    return model.eval()


def their_model(name: str, **more: Any) -> PreTrainedModel:
    kind, given = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **given, **more})
    return randomised(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def assert_same_logits(gpt: GPT, model: PreTrainedModel) -> None:
    """The GPT's error against float64 is at most twice that of transformers, plus a rounding step.

    The reference is the GPT, once it is seen to be transformers' model, whose angles are float32 even in float64.
    """
    tokens = TOKENS % gpt.config.vocab_size
    logits, eager = gpt(tokens), model(tokens).logits
    exact = gpt.double()(tokens)
    torch.testing.assert_close(model.double()(tokens).logits, exact, rtol=1e-4, atol=1e-4)
    assert_accurate(logits, eager, exact)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[ModelConfig], Path]:
    """Makes a run folder with random weights."""

    def make(config: ModelConfig) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.toml").write_text(
            dump(replace(Config(), model=config, train=replace(Config().train, batch_tokens=96)))
        )
        TOKENIZER.save(folder / "tokenizer.json")
        save_weights(folder / "model.safetensors", randomised(GPT(config)).state_dict())
        checkpoint.save_meta(folder, {"status": "finished"})
        return folder

    return make


# ---- in ----


@theirs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained(name, dtype, tmp_path):
    their_model(name).to(dtype).save_pretrained(tmp_path)
    model, gpt = AutoModelForCausalLM.from_pretrained(tmp_path), fastllm.from_pretrained(tmp_path)
    assert gpt.head_weight.dtype == dtype
    assert_same_logits(gpt, model)


@theirs
def test_older_configurations(name, tmp_path):
    """As transformers 4 wrote them."""
    their_model(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config, expected = json.loads(path.read_text()), model_config(path)
    rope = config.pop("rope_parameters")
    config["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config.pop("layer_types", None)
    if expected.attention_dim == 0:
        config["head_dim"] = None
    path.write_text(json.dumps(config))
    assert model_config(path) == expected


def test_sharded_files(tmp_path):
    model = their_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(fastllm.from_pretrained(tmp_path), model)


def test_a_shorter_context(tmp_path):
    their_model("llama").save_pretrained(tmp_path)
    gpt = fastllm.from_pretrained(tmp_path, context=16, dtype=torch.bfloat16)
    assert gpt.model.cos.shape == (16, 8)
    assert gpt.model.cos.dtype == torch.float32
    assert gpt.head_weight.dtype == torch.bfloat16
    for context in (0, 97):
        with pytest.raises(UserError, match="context must be from 1 to the 96"):
            fastllm.from_pretrained(tmp_path, context=context)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; fastllm's GPT reads llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor of rope scaling 'llama3' is 2"),
        ({"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention_factor of rope scaling 'yarn' is 1"),
        ({"rope_parameters": YARN | {"mscale": 1.0}}, "mscale of rope scaling 'yarn' is 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "some layers have a window and some have none",
        ),
        ({"num_attention_heads": 3}, "must be a multiple of"),
    ],
)  # fmt: skip
def test_what_the_gpt_does_not_have(change, words, tmp_path):
    their_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        fastllm.from_pretrained(tmp_path)
    assert words in str(error.value)


def test_folders_that_are_not_whole(tmp_path):
    with pytest.raises(UserError, match=r"can't read .*config\.json: No such file"):
        fastllm.from_pretrained(tmp_path)
    their_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors$"):
        fastllm.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="its weights are pickled: have transformers load and save_pretrained"):
        fastllm.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(UserError, match="names no files beside it"):
        fastllm.from_pretrained(tmp_path)
    weights.write_bytes(content[:1000])
    with pytest.raises(UserError, match="can't read the weights"):
        fastllm.from_pretrained(tmp_path)
    weights.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lacks model\.layers\.2"):
        fastllm.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        fastllm.from_pretrained(tmp_path)


# ---- out ----


@ours
def test_export(name, run, tmp_path):
    config, out = OURS[name], tmp_path / "out"
    assert fastllm.export(run(config), out) == out
    assert layout(config)["model_type"] == name.split(",")[0]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings is config.tie_embeddings
    gpt, _, _ = checkpoint.load_run(tmp_path / "run")
    again = fastllm.from_pretrained(out)
    assert again.config == config
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), gpt.parameters(), strict=True))
    assert_same_logits(gpt, model)


def test_export_in_shards_and_in_bfloat16(run, tmp_path):
    out = fastllm.export(run(SMALL), tmp_path / "out", dtype=torch.bfloat16, max_shard_size="50KB")
    assert (out / "model.safetensors.index.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert_same_logits(fastllm.from_pretrained(out), model)


def test_text_and_tokens_are_the_same_in_transformers(run, tmp_path):
    folder = run(SMALL)
    out = fastllm.export(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = "def add(a, b):\n    naïve = 日本"
    assert tokenizer(prompt).input_ids == TOKENIZER.encode(prompt)
    assert tokenizer.decode(TOKENIZER.encode(prompt)) == prompt
    assert tokenizer.eos_token_id == TOKENIZER.end
    inputs = tokenizer(prompt, return_tensors="pt")
    made = AutoModelForCausalLM.from_pretrained(out).generate(
        **inputs, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    text = tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    for place in (folder, out):
        model, tokens, _ = checkpoint.load_run(place)
        assert "".join(generate(model, tokens, prompt, max_tokens=12, temperature=0)) == text


def test_several_ends(run, tmp_path):
    out = fastllm.export(run(SMALL), tmp_path / "out")
    model, tokenizer, _ = checkpoint.load_run(out)
    first = "".join(generate(model, tokenizer, "def", max_tokens=1, temperature=0))
    (end,) = tokenizer.encode(first)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.end, end]}))
    model, tokenizer, _ = checkpoint.load_run(out)
    assert tokenizer.ends == (TOKENIZER.end, end)
    assert "".join(generate(model, tokenizer, "def", max_tokens=9, temperature=0)) == ""


def test_no_layout():
    with pytest.raises(UserError, match=r"both model\.qk_norm and model\.qkv_bias"):
        layout(replace(SMALL, qk_norm=True, qkv_bias=True))


def test_nothing_is_overwritten_or_left_half(run, tmp_path, monkeypatch):
    folder, out = run(SMALL), tmp_path / "out"
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(UserError, match="there already and not empty"):
        fastllm.export(folder, out)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    with pytest.raises(UserError, match="No space left on device"):
        fastllm.export(folder, tmp_path / "deep" / "other")
    assert not list((tmp_path / "deep").iterdir())


def test_command_line(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run(SMALL)), str(out), "--dtype", "bfloat16"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["generate", str(out), "--prompt", "def", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("def")
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "o")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
