"""Models from GGUF files, against transformers and against the models they were written of."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import fastllm
from fastllm.cli import main
from fastllm.config import ModelConfig
from fastllm.errors import UserError
from fastllm.gguf.header import TYPES, read_header
from fastllm.gguf.load import load
from fastllm.gguf.model_config import model_config
from fastllm.inference import Engine
from fastllm.model.rope import rope_frequencies
from tests.fastllm.huggingface.folders import assert_same_logits

from .files import CONFIGS, SCALES, SIZES, TOKENIZER, model_of, same_weights, write

names = pytest.mark.parametrize("name", CONFIGS)
TYPE_NAMES = [kind.name for kind in TYPES.values()]


def theirs(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@names
def test_floats_come_back_exactly(name, tmp_path):
    model = model_of(CONFIGS[name])
    loaded, tokenizer = fastllm.load(write(tmp_path / "m.gguf", model))
    assert loaded.config == replace(model.config, norm_eps=loaded.config.norm_eps)
    assert loaded.config.norm_eps == pytest.approx(model.config.norm_eps, rel=1e-6)  # float32 in the file
    assert not loaded.training
    assert same_weights(loaded, model)
    assert tokenizer.vocab_size == TOKENIZER.vocab_size
    assert Engine(loaded, tokenizer).generate(["def "], max_tokens=3)[0].text


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", kind) for kind in TYPE_NAMES] + [(name, "Q4_1") for name in CONFIGS if name != "llama"]
)
def test_logits_are_those_of_transformers(name, kind, tmp_path):
    path = write(tmp_path / "m.gguf", model_of(CONFIGS[name]), kind=kind)
    loaded, _ = fastllm.load(path, dtype=torch.float32)
    assert_same_logits(loaded, theirs(path))


@pytest.mark.parametrize("kind", TYPE_NAMES)
def test_dequantised_in_chunks_as_in_one(kind, tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", model_of(CONFIGS["llama"]), kind=kind)
    whole, _ = load(path)
    monkeypatch.setattr("fastllm.gguf.tensors.CHUNK", 1000)
    parts, _ = load(path)
    assert same_weights(whole, parts)
    reader = gguf.GGUFReader(path)  # and as the package itself has it
    entry = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    values = gguf.quants.dequantize(entry.data, entry.tensor_type)
    found = whole.state_dict()["model.layers.1.mlp.down_proj.weight"].float().numpy()
    assert (found == values).all()
    assert values.std() > 1e-3


def test_dtypes(tmp_path):
    model = model_of(CONFIGS["llama"])
    for kind, dtype in (
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("Q8_0", torch.float32),
    ):
        path = write(tmp_path / f"{kind}.gguf", model, kind=kind)
        assert {p.dtype for p in fastllm.load(path)[0].parameters()} == {dtype}
        assert {p.dtype for p in fastllm.load(path, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    plain = write(tmp_path / "plain.gguf", model)
    expected = model.bfloat16()
    assert same_weights(fastllm.load(plain, dtype=torch.bfloat16)[0], expected)


ROPES = {
    "linear": (
        {"rope_scaling": "linear", "rope_factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "linear, older": ({"rope_scaling": "linear", "rope_factor": 4.0}, {"llama.rope.scale_linear": 4.0}),
    "yarn": (
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_max_seq_len": 24},
        {
            "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 24, "llama.rope.scaling.finetuned": True,
        },
    ),
    "none": ({}, {"llama.rope.scaling.type": "none"}),
    "window": ({"window": 8}, {"llama.attention.sliding_window": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_and_window(name, tmp_path):
    fields, keys = ROPES[name]
    model = model_of(ModelConfig(**SIZES, **fields))
    loaded, _ = fastllm.load(write(tmp_path / "m.gguf", model, keys=keys))
    assert replace(loaded.config, norm_eps=0.01) == model.config


def llama3_factors(theta: float, head_dim: int, factor: float, original: int) -> torch.Tensor:
    """As llama.cpp's converter writes them, in float32."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    found = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4.0:
            found.append(1.0)
        elif wavelength > original / 1.0:
            found.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            found.append(float(1 / ((1 - smooth) / factor + smooth)))
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("theta", "factor", "original"),
    [(5e5, 8.0, 8192), (5e5, 32.0, 8192), (5e3, 4.0, 24), (1e6, 2.5, 4096), (1e4, 8.0, 1), (5e5, 8.0, 2**28)],
)
def test_llama3_factors(theta, factor, original, tmp_path):
    """The length before scaling is found from the factors; where none lies between, any that has them will do."""
    sizes = {**SIZES, "rope_theta": theta}
    model = model_of(
        ModelConfig(**sizes, rope_scaling="llama3", rope_factor=factor, rope_original_max_seq_len=original)
    )
    factors = llama3_factors(theta, 64, factor, original)
    path = write(tmp_path / "m.gguf", model, change=lambda tensors: tensors.update({"rope_freqs.weight": factors}))
    config = model_config(read_header(path))
    if factors.max() == 1:
        assert config.rope_scaling == "none"
    else:
        assert (config.rope_scaling, config.rope_factor) == ("llama3", factor)
        assert config.rope_original_max_seq_len == original or set(factors.tolist()) <= {1.0, factor}
    torch.testing.assert_close(rope_frequencies(config), rope_frequencies(model.config), rtol=1e-6, atol=0)


@pytest.mark.parametrize("change", [lambda f: f * 1.001, lambda f: f.flip(0), lambda f: f[1:], lambda f: f * math.nan])
def test_other_factors_are_refused(change, tmp_path):
    factors = change(llama3_factors(5e5, 64, 8.0, 8192))
    model = model_of(ModelConfig(**{**SIZES, "rope_theta": 5e5}))
    path = write(tmp_path / "m.gguf", model, change=lambda tensors: tensors.update({"rope_freqs.weight": factors}))
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        fastllm.load(path)


def test_all_layers_alike(tmp_path):
    """Some files have a number of heads for each layer."""
    model = model_of(CONFIGS["llama"])
    path = write(tmp_path / "m.gguf", model, keys={"llama.attention.head_count_kv": [2, 2]})
    assert fastllm.load(path)[0].config.kv_heads == 2
    path = write(tmp_path / "n.gguf", model, keys={"llama.attention.head_count_kv": [2, 1]})
    with pytest.raises(UserError, match=r"llama\.attention\.head_count_kv must be a whole number"):
        fastllm.load(path)


def test_memory(tmp_path):
    """A quantised file is never dequantised as a whole beside the model."""
    config = ModelConfig(**{**SIZES, "dim": 1024, "ffn_dim": 4096, "layers": 2})
    model = model_of(config)
    size = sum(p.numel() for p in model.parameters()) * 4
    path = write(tmp_path / "m.gguf", model, kind="Q8_0")
    write(tmp_path / "small.gguf", model_of(CONFIGS["llama"]), kind="Q8_0")
    script = f"""
import fastllm, torch
from fastllm.hardware import peak_memory
fastllm.load({str(tmp_path / "small.gguf")!r})
before = peak_memory(torch.device("cpu"))
fastllm.load({str(path)!r})
print((peak_memory(torch.device("cpu")) - before) / {size})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
    assert float(output) < 1.4


def test_command_line(tmp_path, capsys):
    path = write(tmp_path / "m.gguf", model_of(CONFIGS["qwen2"]), kind="Q8_0")
    assert main(["generate", str(path), "--prompt", "def ", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_every_scale_is_set():
    assert set(TYPE_NAMES) > set(SCALES)
