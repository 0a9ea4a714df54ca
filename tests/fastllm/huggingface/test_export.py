"""The GPT as a Hugging Face folder, against transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastllm
from fastllm import run_dir
from fastllm.cli import main
from fastllm.config import Config, ModelConfig, dump
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError
from fastllm.huggingface.export import layout
from fastllm.inference import Engine
from fastllm.model.gpt import GPT
from fastllm.model.weights import save_weights

from .folders import TOKENIZER, assert_same_logits, randomised

SMALL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, max_seq_len=96, dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=96,
    rope_theta=5000.0, norm_eps=0.01,
)  # fmt: skip
OURS = {
    "llama": SMALL,
    "llama, untied, yarn": replace(
        SMALL, tie_embeddings=False, rope_scaling="yarn", rope_factor=4.0, rope_original_max_seq_len=24
    ),
    "llama, llama3": replace(SMALL, rope_scaling="llama3", rope_factor=4.0, rope_original_max_seq_len=24),
    "mistral": replace(SMALL, window=8, rope_scaling="linear", rope_factor=2.0),
    "mistral, width no multiple of heads": replace(SMALL, dim=62, attention_dim=64),
    "qwen2": replace(SMALL, qkv_bias=True),
    "qwen2, window": replace(SMALL, qkv_bias=True, window=8),
    "qwen3": replace(SMALL, qk_norm=True, attention_dim=128),
    "qwen3, window": replace(SMALL, qk_norm=True, window=8),
}
ours = pytest.mark.parametrize("name", OURS)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[ModelConfig], Path]:
    """Makes a run folder with random weights."""

    def make(config: ModelConfig) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.toml").write_text(
            dump(replace(Config(), model=config, train=replace(Config().train, global_batch_tokens=96)))
        )
        TOKENIZER.save(folder / "tokenizer.json")
        save_weights(folder / "model.safetensors", randomised(GPT(config)).state_dict())
        run_dir.save_metadata(folder, {"status": "finished"})
        return folder

    return make


@ours
def test_export(name, run, tmp_path):
    config, out = OURS[name], tmp_path / "out"
    assert fastllm.export(run(config), out) == out
    assert layout(config)["model_type"] == name.split(",")[0]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings is config.tie_embeddings
    gpt, _ = fastllm.load(tmp_path / "run")
    again = fastllm.from_pretrained(out)
    assert again.config == config
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), gpt.parameters(), strict=True))
    assert_same_logits(gpt, model)


def test_export_in_shards_and_in_bfloat16(run, tmp_path):
    out = fastllm.export(run(SMALL), tmp_path / "out", dtype=torch.bfloat16, max_shard_size="50KB")
    assert (out / "model.safetensors.index.json").is_file()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert_same_logits(fastllm.from_pretrained(out), model)


@pytest.mark.parametrize(("size", "file"), [("50KB", "model.safetensors.index.json"), ("5GB", "model.safetensors")])
def test_the_tokenizer_is_named(size, file, run, tmp_path):
    out = fastllm.export(run(SMALL), tmp_path / "out", max_shard_size=size)
    fastllm.load(out)
    other = Tokenizer.train(["other text " * 20], TOKENIZER.vocab_size)
    other.save(out / "tokenizer.json")
    with pytest.raises(UserError, match=rf"the weights {out / file} were trained with another tokenizer"):
        fastllm.load(out)


def test_text_and_tokens_are_the_same_in_transformers(run, tmp_path):
    folder = run(SMALL)
    out = fastllm.export(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = "def add(a , b):\n    naïve = 日本"
    assert tokenizer(prompt).input_ids == TOKENIZER.encode(prompt)
    assert tokenizer.decode(TOKENIZER.encode(prompt)) == prompt
    assert tokenizer.eos_token_id == TOKENIZER.eos_id
    assert tokenizer.model_max_length == SMALL.max_seq_len
    inputs = tokenizer(prompt, return_tensors="pt")
    made = AutoModelForCausalLM.from_pretrained(out).generate(
        **inputs, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    text = tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    for place in (folder, out):
        model, tokens = fastllm.load(place)
        assert Engine(model, tokens).generate([prompt], max_tokens=12, temperature=0)[0].text == text


def test_several_ends(run, tmp_path):
    out = fastllm.export(run(SMALL), tmp_path / "out")
    model, tokenizer = fastllm.load(out)
    first = Engine(model, tokenizer).generate(["def"], max_tokens=1, temperature=0)[0].text
    (end,) = tokenizer.encode(first)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, end]}))
    model, tokenizer = fastllm.load(out)
    assert tokenizer.eos_ids == (TOKENIZER.eos_id, end)
    assert Engine(model, tokenizer).generate(["def"], max_tokens=9, temperature=0)[0].text == ""


def test_no_layout():
    with pytest.raises(UserError, match=r"both model\.qk_norm and model\.qkv_bias"):
        layout(replace(SMALL, qk_norm=True, qkv_bias=True))
    with pytest.raises(UserError, match=r"model\.qkv_bias with a model\.attention_dim"):
        layout(replace(SMALL, attention_dim=128, qkv_bias=True))


def test_nothing_is_overwritten_or_left_half(run, tmp_path, monkeypatch):
    folder, out = run(SMALL), tmp_path / "out"
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(UserError, match="there already and not empty"):
        fastllm.export(folder, out)
    with pytest.raises(UserError, match=r"^\. is no name for a new folder"):
        fastllm.export(folder, ".")
    with pytest.raises(UserError, match=r"^can't write .*: File name too long"):
        fastllm.export(folder, tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="there is no run folder"):
        fastllm.export("x" * 300, tmp_path / "other")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    with pytest.raises(UserError, match="No space left on device"):
        fastllm.export(folder, tmp_path / "deep" / "other")
    assert not list((tmp_path / "deep").iterdir())
    monkeypatch.undo()
    out = fastllm.export(folder, tmp_path / "whole")
    with pytest.raises(UserError, match="is a Hugging Face folder already"):
        fastllm.export(out, tmp_path / "again")


def test_command_line(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run(SMALL)), str(out), "--dtype", "bfloat16"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["generate", str(out), "--prompt", "def", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("def")
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "o")]) == 2
    assert "there is no run folder" in capsys.readouterr().err


def test_chat_template(run, tmp_path):
    """transformers applies it to the exported folder, and the GPT that comes back ends its answers alike."""
    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n" * 20], 300, chat=True)
    folder = run(replace(SMALL, vocab_size=tokenizer.vocab_size))
    tokenizer.save(folder / "tokenizer.json")
    assert fastllm.load(folder)[1].chat_template is None
    source = (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(source)
    _, ours = fastllm.load(folder)
    _, back = fastllm.load(fastllm.export(folder, tmp_path / "hf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": "  a é\n b"}]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ours.chat_template is not None and back.chat_template is not None
    assert ours.chat_template.encode(ours, chat) == back.chat_template.encode(back, chat) == expected
    ends = [ours.backend.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    assert list(ours.eos_ids) == list(back.eos_ids) == ends
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == ends
