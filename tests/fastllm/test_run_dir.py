from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastllm
from fastllm import run_dir
from fastllm.config import Config, ModelConfig, dump
from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import UserError
from fastllm.files import atomic, write_atomic
from fastllm.model.gpt import GPT
from fastllm.model.weights import load_weights, read_weights_metadata, save_weights

TOKENIZER = Tokenizer.train(["some text " * 10], 270)
SMALL = ModelConfig(vocab_size=TOKENIZER.vocab_size, max_seq_len=32, dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=48)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tied, tmp_path):
    config = replace(SMALL, tie_embeddings=tied)
    model = GPT(config)
    save_weights(tmp_path / "w.safetensors", model.state_dict())
    other = load_weights(config, tmp_path / "w.safetensors")
    assert ("lm_head.weight" in load_file(tmp_path / "w.safetensors")) is not tied
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_that_do_not_fit_are_named(tmp_path):
    path, state = tmp_path / "w.safetensors", GPT(SMALL).state_dict()

    def load(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path)
        load_weights(SMALL, path)

    with pytest.raises(UserError, match=r"lacks model\.norm\.weight and has the unknown extra"):
        load({"extra": torch.ones(1), **{k: v for k, v in state.items() if k != "model.norm.weight"}})
    with pytest.raises(UserError, match=r"model\.norm\.weight is \[31\], the configuration makes it \[32\]"):
        load(state | {"model.norm.weight": torch.ones(31)})
    with pytest.raises(UserError, match=r"and \d+ more"):
        load({"model.norm.weight": torch.ones(32)})
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="can't read the weights"):
        load_weights(SMALL, path)
    with pytest.raises(UserError, match="can't read the weights"):
        load_weights(SMALL, tmp_path / "none")


def test_a_run_that_is_not_whole(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="there is no run folder"):
        fastllm.load(run)
    run.mkdir()
    with pytest.raises(UserError, match=r"has no config\.toml, tokenizer\.json, model\.safetensors, run\.json"):
        run_dir.load_run(run)
    (run / "config.toml").write_text(dump(Config(model=SMALL)))
    TOKENIZER.save(run / "tokenizer.json")
    run_dir.save_metadata(run, {"status": "training"})
    with pytest.raises(UserError, match=r"has no model\.safetensors: its training has not finished"):
        run_dir.load_run(run)
    save_weights(run / "model.safetensors", GPT(SMALL).state_dict())
    assert run_dir.load_metadata(run) == {"status": "training"}
    assert run_dir.load_run(run)[1].vocab_size == SMALL.vocab_size
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        run_dir.load_metadata(run)
    (run / "config.toml").write_text(dump(Config(model=replace(SMALL, vocab_size=999))))
    with pytest.raises(UserError, match=r"model\.vocab_size in config\.toml is 999"):
        run_dir.load_run(run)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_changes_nothing(error, tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail() -> None:
        with atomic(path) as part:
            part.write_bytes(b"half of the ne")
            raise error

    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        fail()
    if isinstance(error, OSError):
        assert str(raised.value) == f"can't write {path}: No space left on device"
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_write_to_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="can't write"):
        write_atomic(tmp_path / "none" / "file", b"")


def test_weights_of_another_tokenizer(tmp_path):
    """Of the same size; weights that name none are taken at their word."""
    other = Tokenizer.train(["more words " * 10], TOKENIZER.vocab_size)
    assert other.vocab_size == TOKENIZER.vocab_size
    (tmp_path / "config.toml").write_text(dump(Config(model=SMALL)))
    run_dir.save_metadata(tmp_path, {"status": "finished"})
    weights, path = tmp_path / "model.safetensors", tmp_path / "tokenizer.json"
    save_weights(weights, GPT(SMALL).state_dict(), {"tokenizer": TOKENIZER.fingerprint, "step": "7"})
    assert read_weights_metadata(weights) == {"format": "pt", "tokenizer": TOKENIZER.fingerprint, "step": "7"}
    TOKENIZER.save(path)
    run_dir.load_run(tmp_path)
    other.save(path)
    with pytest.raises(UserError, match=rf"{weights} were trained with another tokenizer than {path}"):
        run_dir.load_run(tmp_path)
    save_weights(weights, GPT(SMALL).state_dict())
    run_dir.load_run(tmp_path)


@pytest.mark.parametrize("name", ["config.toml", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b"a = " + b"[" * 100_000),
        lambda path: path.write_bytes(b"\xff" * 8 + bytes(100)),
        lambda path: path.write_text("[model]\nlayers = 1_000_000_000\nvocab_size = 1_000_000_000"),
        lambda path: os.truncate(path, 2**40),
        lambda path: path.unlink() or os.mkfifo(path),
        lambda path: path.unlink() or path.symlink_to("/dev/zero"),
        lambda path: path.unlink() or path.mkdir(),
        lambda path: path.unlink() or path.symlink_to(path),
    ],
)
def test_damaged_files(name, change, tmp_path):
    """One line each, without waiting or taking memory."""
    (tmp_path / "config.toml").write_text(dump(Config(model=SMALL)))
    TOKENIZER.save(tmp_path / "tokenizer.json")
    run_dir.save_metadata(tmp_path, {"status": "finished"})
    save_weights(tmp_path / "model.safetensors", GPT(SMALL).state_dict())
    fastllm.load(tmp_path)
    change(tmp_path / name)
    with pytest.raises(UserError) as error:
        fastllm.load(tmp_path)
    assert name in str(error.value)
    assert str(error.value).isprintable()


def test_absurd_sizes(tmp_path):
    """The configuration is compared with the headers before a model is built."""
    save_weights(tmp_path / "w.safetensors", GPT(SMALL).state_dict())
    with pytest.raises(UserError, match=r"lacks model\.layers\.10\.\S+, \S+, \S+ and 8,999,999,979 more"):
        load_weights(replace(SMALL, layers=10**9), tmp_path / "w.safetensors")
    for sizes in ({"vocab_size": 2**30}, {"dim": 2**30, "attention_dim": 32}, {"ffn_dim": 2**30}):
        with pytest.raises(UserError, match=r"the configuration makes it \[.*1073741824"):
            load_weights(replace(SMALL, **sizes), tmp_path / "w.safetensors")


def test_more_weights_than_memory(tmp_path, monkeypatch):
    save_weights(tmp_path / "w.safetensors", GPT(SMALL).state_dict())
    load_weights(SMALL, tmp_path / "w.safetensors")
    monkeypatch.setattr("fastllm.model.weights._memory", lambda: 1000)
    with pytest.raises(UserError, match=r"w\.safetensors holds \d+ GiB of weights, this machine has \d+"):
        load_weights(SMALL, tmp_path / "w.safetensors")


def test_weights_that_are_not_finite(tmp_path):
    """In the dtype that is asked for."""
    state = GPT(SMALL).state_dict()
    state["model.norm.weight"][3] = 1e30
    save_weights(tmp_path / "w.safetensors", state)
    load_weights(SMALL, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w\.safetensors are not finite: model\.norm\.weight"):
        load_weights(SMALL, tmp_path / "w.safetensors", dtype=torch.float16)
