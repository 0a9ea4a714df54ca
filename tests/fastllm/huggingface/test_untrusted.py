"""Hugging Face folders that are damaged or crafted: each loads and works, or gets one line that names the file."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastllm
from fastllm.errors import UserError
from fastllm.huggingface.model_config import model_config
from fastllm.model.gpt import GPT
from fastllm.model.weights import save_weights

from .folders import TOKENIZER, randomised

CONFIG, GENERATION, FILE, WEIGHTS = "config.json", "generation_config.json", "tokenizer.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
SIZES = {
    "vocab_size": TOKENIZER.vocab_size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip
KEYS = {
    **SIZES, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "eos_token_id": 0, "attention_bias": False, "mlp_bias": False, "quantization_config": None,
    "partial_rotary_factor": 1.0, "rope_scaling": None, "original_max_position_embeddings": 16,
}  # fmt: skip
WINDOW = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}
SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
MEMORY = 3 * 2**30  # more than a folder may take

Change = Callable[[Path], None]


class Raw(str):
    """A value that json.dumps doesn't write."""


HUGE, DEEP = Raw("1" + "0" * 5000), Raw("[" * 5000 + "]" * 5000)
ODD = {
    "null": None, "true": True, "false": False, "string": "x", "list": [1], "empty list": [],
    "empty": {}, "mapping": {"a": [1, None, {}]}, "negative": -1, "zero": 0, "half": 0.5, "whole float": 16.0,
    "NaN": math.nan, "infinite": Raw("1e400"), "billion": 10**9, "2^63": 2**63,
    "huge": HUGE, "deep": DEEP, "large": 1e300, "nested": [[0]],
    "mixed": [0, "a", None], "long": "x" * 5000, "control": "\x1b[2J\n",
}  # fmt: skip


def dumped(value: Any) -> str:
    """JSON, with raw values in it."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumped(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def edit(name: str, **changes: Any) -> Change:
    """Other values at the top of a JSON file."""
    return lambda folder: write(name, dumped(json.loads((folder / name).read_text()) | changes))(folder)


def edit_part(name: str, *path: str | int, value: Any) -> Change:
    """Another value deep in a JSON file."""

    def change(folder: Path) -> None:
        content = part = json.loads((folder / name).read_text())
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        write(name, dumped(content))(folder)

    return change


def config_changes() -> Iterator[tuple[str, Change]]:
    for kind, value in ODD.items():
        for key in KEYS:
            yield f"config.json: {key} is {kind}", edit(CONFIG, **{key: value})
        for key in WINDOW:
            changes = {**WINDOW, key: value, "model_type": "qwen3"}
            yield f"config.json: qwen3's {key} is {kind}", edit(CONFIG, **changes)
        for key in SCALING:
            yield f"config.json: {key} of rope_scaling is {kind}", edit(CONFIG, rope_scaling={**SCALING, key: value})
        yield f"config.json: rope_parameters is {kind}", edit(CONFIG, rope_parameters=value)
        yield f"config.json: model_type is {kind}", edit(CONFIG, model_type=value)
        yield f"generation_config.json: eos_token_id is {kind}", write(GENERATION, dumped({"eos_token_id": value}))
    yield "config.json: all sizes absurd", edit(CONFIG, **dict.fromkeys(SIZES, 2**30))
    for key in SIZES:
        yield f"config.json: large {key}", edit(CONFIG, **{key: 2**30})


def tokenizer_changes() -> Iterator[tuple[str, Change]]:
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    yield "tokenizer.json: padding to 10^9", edit(FILE, padding=padding)
    yield "tokenizer.json: truncation", edit(FILE, truncation=truncation)
    template = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    for name, tokens in (
        ("unknown", {}),
        ("out of range", {"x": {"id": "x", "ids": [10**6], "tokens": ["x"]}}),
    ):
        processor = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": tokens}
        yield f"tokenizer.json: a template with a token that is {name}", edit(FILE, post_processor=processor)
    yield "tokenizer.json: a normalizer that panics", edit(FILE, normalizer={"type": "Prepend", "prepend": ""})
    for kind, value in ODD.items():
        if kind != "deep":
            yield f"tokenizer.json: an id is {kind}", edit_part(FILE, "model", "vocab", "a", value=value)
        for key in ("vocab", "merges", "continuing_subword_prefix", "dropout", "unk_token", "type"):
            yield f"tokenizer.json: {key} is {kind}", edit_part(FILE, "model", key, value=value)
        yield f"tokenizer.json: a merge is {kind}", edit_part(FILE, "model", "merges", 0, value=value)
        for key in ("model", "decoder", "pre_tokenizer", "added_tokens", "post_processor", "normalizer", "padding"):
            yield f"tokenizer.json: {key} is {kind}", edit(FILE, **{key: value})


def file_changes() -> Iterator[tuple[str, Change]]:
    def replaced(name: str, make: Callable[[Path], Any]) -> Change:
        def change(folder: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            make(folder / name)

        return change

    for name in (CONFIG, GENERATION, FILE, WEIGHTS):
        yield f"{name}: a pipe", replaced(name, os.mkfifo)
        yield f"{name}: a device", replaced(name, lambda path: path.symlink_to("/dev/zero"))
        yield f"{name}: a folder", replaced(name, Path.mkdir)
        yield f"{name}: a link to nothing", replaced(name, lambda path: path.symlink_to("none"))
        yield f"{name}: a link to itself", replaced(name, lambda path: path.symlink_to(path))
        yield f"{name}: a terabyte of nothing", lambda folder, name=name: os.truncate(folder / name, 2**40)
        for kind, content in {
            "empty": b"", "null": b"null", "a list": b"[1]", "not UTF-8": b'{"a": "\xff"}', "half": b'{"a": ',
            "UTF-16": '{"a": 1}'.encode("utf-16"), "a mark": b"\xef\xbb\xbf{}", "deep": b"[" * 10**6,
            "deep maps": b'{"a":' * 10**5, "zeros": bytes(1000), "digits": b'{"a": 1' + b"0" * 5000 + b"}",
        }.items():  # fmt: skip
            yield f"{name}: {kind}", write(name, content)


def weight_changes() -> Iterator[tuple[str, Change]]:
    def header(change: Callable[[dict[str, Any]], Any], tail: bytes = b"") -> Change:
        def changed(folder: Path) -> None:
            content = (folder / WEIGHTS).read_bytes()
            (size,) = struct.unpack("<Q", content[:8])
            values = json.loads(content[8 : 8 + size])
            text = dumped(change(values) or values).encode()
            (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :] + tail)

        return changed

    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    for size in (0, 1, 7, 10**9, 10**18, 2**64 - 1):
        content = struct.pack("<Q", size)
        yield f"{WEIGHTS}: a header of {size} bytes", write(WEIGHTS, content)
        yield f"{WEIGHTS}: a header of {size} bytes, and some", write(WEIGHTS, content + b"{}" * 1000)
    for kind, value in ODD.items():
        for key in ("dtype", "shape", "data_offsets"):
            yield f"{WEIGHTS}: {key} is {kind}", header(lambda h, k=key, v=value: h[norm].update({k: v}))
        yield f"{WEIGHTS}: metadata is {kind}", header(lambda h, v=value: h.update(__metadata__=v))
        yield f"{WEIGHTS}: a tensor is {kind}", header(lambda h, v=value: h.update({norm: v}))
    for dtype in ("I8", "I32", "I64", "BOOL", "F8_E4M3", "U8", "F4", "C64"):
        yield f"{WEIGHTS}: dtype {dtype}", header(lambda h, d=dtype: h[norm].update(dtype=d))
    yield f"{WEIGHTS}: overlap", header(lambda h: h[norm].update(data_offsets=h[embedding]["data_offsets"]))
    yield f"{WEIGHTS}: beyond the file", header(lambda h: h[norm].update(data_offsets=[10**12, 10**12 + 64]))
    yield f"{WEIGHTS}: backwards", header(lambda h: h[norm]["data_offsets"].reverse())
    yield f"{WEIGHTS}: bytes left over", header(lambda h: None, b"x")
    yield f"{WEIGHTS}: an absurd shape", header(lambda h: h[norm].update(shape=[2**40, 2**40]))
    yield f"{WEIGHTS}: no elements", header(lambda h: h[norm].update(shape=[0, 2**62], data_offsets=[0, 0]))
    yield f"{WEIGHTS}: an odd name", header(lambda h: h.update({"\x1b[2J\n" * 1000: h.pop(norm)}))
    yield f"{WEIGHTS}: another name", header(lambda h: h.update(another=h.pop(norm)))
    yield f"{WEIGHTS}: another tokenizer", header(lambda h: h.update(__metadata__={"tokenizer": "another"}))
    for value in (math.nan, math.inf, -math.inf):
        for name in (norm, embedding, "model.layers.1.mlp.up_proj.weight"):

            def spoiled(folder: Path, name: str = name, value: float = value) -> None:
                model = fastllm.from_pretrained(folder)
                tensors = {key: t.clone() for key, t in model.state_dict().items()}
                tensors[name].view(-1)[3] = value
                save_weights(folder / WEIGHTS, tensors)

            yield f"{WEIGHTS}: {name} has {value}", spoiled

    def sharded(index: Any) -> Change:
        def change(folder: Path) -> None:
            (folder / WEIGHTS).rename(folder / "one.safetensors")
            (folder / INDEX).write_text(dumped(index))

        return change

    for kind, value in ODD.items():
        yield f"{INDEX}: is {kind}", sharded(value)
        yield f"{INDEX}: weight_map is {kind}", sharded({"weight_map": value})
        yield (
            f"{INDEX}: metadata is {kind}",
            sharded({"weight_map": {"a": "one.safetensors"}, "metadata": value}),
        )
        yield f"{INDEX}: a name is {kind}", sharded({"weight_map": {"a": "one.safetensors", "b": value}})
    for name in ("..", ".", "/etc/passwd", "a/../one.safetensors", "\x00", "none.safetensors", "\ud800", ""):
        yield f"{INDEX}: names {name!r}", sharded({"weight_map": {"a": "one.safetensors", "b": name}})
    yield f"{INDEX}: a file twice", lambda folder: (
        sharded({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})(folder),
        shutil.copy(folder / "one.safetensors", folder / "two.safetensors"),
    )  # fmt: skip


CHANGES = dict([*config_changes(), *tokenizer_changes(), *file_changes(), *weight_changes()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with nothing wrong."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / CONFIG).write_text(json.dumps({**KEYS, "model_type": "llama"}))
    (folder / GENERATION).write_text("{}")
    TOKENIZER.save(folder / FILE)
    save_weights(folder / WEIGHTS, randomised(GPT(model_config(folder / CONFIG))).state_dict())
    return folder


@pytest.fixture(scope="module")
def little_memory() -> Iterator[None]:
    """What is larger can't be allocated, where the system has such a limit."""
    if not os.path.exists("/proc/self/statm"):
        yield
        return
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@torch.no_grad()
def outcome(folder: Path) -> str:
    """The error's line; empty where the folder loads and works."""
    try:
        model, tokenizer = fastllm.load(folder)
    except UserError as error:
        return str(error)
    ids = tokenizer.encode("def add(a, b):  ")
    assert all(0 <= token < model.config.vocab_size for token in (*ids, *tokenizer.eos_ids))
    assert len(ids) > 3
    tokens = torch.tensor([ids])[:, : model.config.max_seq_len]
    assert model(tokens).isfinite().all()
    return ""


def test_the_whole_folder(whole):
    assert outcome(whole) == ""


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_that_was_changed(name, whole, little_memory, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    CHANGES[name](folder)
    message = outcome(folder)
    assert message.isprintable()
    assert len(message) < 1000
    if message:
        assert str(folder) in message
        assert (
            any(file.name in message for file in folder.iterdir()) or "No such file" in message or "has no" in message
        )
