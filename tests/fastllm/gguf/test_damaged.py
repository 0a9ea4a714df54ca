"""GGUF files that are cut, damaged or of models that the GPT is not: one clear line each, and no large allocation."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

import fastllm
from fastllm.cli import main
from fastllm.config import ModelConfig
from fastllm.errors import UserError
from fastllm.gguf.header import read_header

from .files import CONFIGS, SIZES, add, model_of, write

SMALL = model_of(ModelConfig(**{**SIZES, "dim": 32, "ffn_dim": 32, "layers": 1}))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = write(tmp_path_factory.mktemp("good") / "m.gguf", SMALL, kind="Q8_0")
    fastllm.load(path)
    return path.read_bytes()


def refused(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        fastllm.load(path)
    message = str(raised.value)
    assert message.isprintable() and len(message) < 1000 and str(path) in message
    return message


def test_cut_anywhere(good, tmp_path):
    path = tmp_path / "m.gguf"
    places = [*range(64), *random.Random(0).sample(range(64, len(good)), 60), len(good) - 64]
    for place in places:
        path.write_bytes(good[:place])
        refused(path)


def test_any_bytes_changed(good, tmp_path):
    """Either the file is refused, or the change doesn't matter: nothing else is raised, and little is allocated."""
    path, generator = tmp_path / "m.gguf", random.Random()
    header = good.index(b"token_embd.weight") + 1500
    tracemalloc.start()
    for _ in range(150):
        content = bytearray(good)
        for _ in range(generator.choice((1, 1, 3))):
            place = generator.randrange(header)
            content[place] = generator.choice((0, 1, 255, 127, content[place] ^ 1 << generator.randrange(8)))
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            fastllm.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.mark.parametrize("size", [2**31, 2**40, 2**63, 2**64 - 1])
def test_absurd_sizes(size, good, tmp_path):
    """In each place that has a size: counts, lengths of keys and arrays, dimensions."""
    path, number = tmp_path / "m.gguf", struct.pack("<Q", size)
    key, tokens = good.index(b"llama.context_length"), good.index(b"tokenizer.ggml.tokens") + 21
    tensor = good.index(b"token_embd.weight") + 17
    for place in (8, 16, key - 8, tokens + 8, tokens + 16, tensor + 4, tensor + 12, tensor + 24):
        path.write_bytes(good[:place] + number + good[place + 8 :])
        refused(path)


def test_other_files(tmp_path):
    path = tmp_path / "m.gguf"
    for content, message in (
        (b"", "it ends within its beginning; is it cut?"),
        (b"PK\x03\x04" * 100, "it is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its GGUF version is 1; fastllm reads 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its GGUF version is 3 of another byte order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture is None"),
    ):
        path.write_bytes(content)
        assert message in refused(path)


MODEL = model_of(CONFIGS["llama"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.alignment": 24}, "general.alignment is 24, which is no power of two"),
        ({"llama.embedding_length": None}, "llama.embedding_length must be a whole number"),
        ({"llama.embedding_length": 0}, "llama.embedding_length must be a whole number from 1"),
        ({"llama.embedding_length": 2.5}, "llama.embedding_length must be a whole number"),
        ({"llama.embedding_length": "many"}, "llama.embedding_length must be a whole number"),
        ({"llama.embedding_length": 512}, "token_embd.weight is [301, 256], the configuration makes it [301, 512]"),
        ({"llama.block_count": 3}, "lacks blk.2.attn_norm.weight, blk.2.ffn_down.weight, blk.2.ffn_gate.weight and 6"),
        ({"llama.block_count": 2**30}, "and 9,663,676,395 more"),
        ({"llama.block_count": 1}, "has the unknown blk.1.attn_norm.weight, "),
        ({"llama.attention.head_count": 3}, "model.heads (3) must be a multiple of model.kv_heads (2)"),
        ({"llama.attention.head_count": 2**30}, "llama.attention.head_count (1073741824) times the size of a head"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length is 32, which fastllm's GPT does not have"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count is 32"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base must be a finite number"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast is 8.0"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5}, "model.rope_factor must be at least"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "llama.attention.layer_norm_rms_epsilon must be a finite"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, which fastllm's GPT does not have"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"llama.new_kind_of_layer": True}, "llama.new_kind_of_layer is True: fastllm does not know what it means"),
        ({"llama.context_length": 2**31}, "llama.context_length must be a whole number"),
        ({"tokenizer.chat_template": 7}, "tokenizer.chat_template must be a text, it is 7"),
    ],
)
def test_keys(keys, message, tmp_path):
    assert message in refused(write(tmp_path / "m.gguf", MODEL, keys=keys))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_embd.weight", None, "has no matrix token_embd.weight"),
        ("blk.1.ffn_up.weight", None, "lacks blk.1.ffn_up.weight"),
        ("blk.1.attn_output.bias", torch.ones(256), "has the unknown blk.1.attn_output.bias"),
        ("model.norm.weight", torch.ones(256), "has the unknown model.norm.weight"),
        ("blk.7.ffn_up.weight", torch.ones(256, 256), "has the unknown blk.7.ffn_up.weight"),
        ("blk.1.ffn_up.weight", torch.ones(256, 512), "blk.1.ffn_up.weight is [256, 512], the configuration makes it"),
        ("output_norm.weight", torch.full((256,), torch.nan), "output_norm.weight has NaN or infinite values"),
        ("blk.0.ffn_up.weight", torch.full((512, 256), torch.inf), "blk.0.ffn_up.weight has NaN or infinite values"),
    ],
)
def test_tensors(name, value, message, tmp_path):
    def change(tensors: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    assert message in refused(write(tmp_path / "m.gguf", MODEL, change=change))


def test_scales_that_are_not_finite(tmp_path):
    path = write(tmp_path / "m.gguf", SMALL, kind="Q8_0")
    content = bytearray(path.read_bytes())
    place = read_header(path).tensors["token_embd.weight"].offset
    content[place : place + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    assert "token_embd.weight has NaN or infinite values" in refused(path)


def test_other_architectures_and_types(tmp_path):
    path = tmp_path / "m.gguf"
    for arch, kind, message in (
        ("gemma3", "F32", "general.architecture is 'gemma3'; fastllm's GPT reads llama, qwen2, qwen3"),
        ("llama", "IQ4_XS", "the tensor token_embd.weight is of the type IQ4_XS; fastllm reads F32, F16, Q4_0,"),
        ("llama", "I32", "the tensor token_embd.weight is of the type I32"),
    ):
        writer, stored = GGUFWriter(path, arch), GGMLQuantizationType[kind]
        add(writer, "general.name", "x")
        data = {"IQ4_XS": np.zeros((4, 136), np.uint8), "I32": np.zeros((4, 256), np.int32)}
        writer.add_tensor("token_embd.weight", data.get(kind, np.zeros((4, 256), np.float32)), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert message in refused(path)
    content = path.read_bytes()
    place = content.index(b"token_embd.weight") + 17 + 4 + 16
    path.write_bytes(content[:place] + struct.pack("<I", 999) + content[place + 4 :])
    assert "is of the type 999, which is unknown" in refused(path)


def test_larger_than_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("fastllm.model.weights.host_memory", lambda: 2**16)
    assert "GiB of weights, this machine has" in refused(write(tmp_path / "m.gguf", MODEL))


def test_without_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", MODEL)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r'reading a GGUF file needs gguf: pip install "fastllm-kernels\[gguf\]"'):
        fastllm.load(path)


def test_command_line(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert main(["generate", str(path)]) == 2
    assert (
        capsys.readouterr().err
        == f"fastllm: error: can't read the model {path}: it ends within its beginning; is it cut?\n"
    )
