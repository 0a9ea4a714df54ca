from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastllm import config as configs
from fastllm.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from fastllm.errors import UserError
from fastllm.planning.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_toml_round_trip(name, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(configs.dump(PRESETS[name]))
    assert configs.load(path) == PRESETS[name]


@settings(deadline=None)  # a busy machine
@given(st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.binary().map(os.fsdecode))))
@example(
    ["/a/b\udcff.txt", "file:x%41", "file:", "a\nb", "\"'\\"]
)  # bytes that are not UTF-8, and what looks like them
def test_toml_strings_round_trip(tmp_path_factory, paths):
    config = replace(Config(), data=DataConfig(paths=tuple(paths)))
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(configs.dump(config), encoding="utf-8", newline="")
    assert configs.load(path) == config


def test_toml_is_laid_over_the_base(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[model]\ndim = 96\n\n[optim]\nlr = 1\n")
    config = configs.load(path, PRESETS["124m"])
    assert config.model == replace(PRESETS["124m"].model, dim=96)
    assert config.optim.lr == 1.0
    assert config.train == PRESETS["124m"].train


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[modle]\ndim = 4", ["modle", "'model'"]),
        ("[train]\nstep = 4", ["'step'", "'steps'", "[train]"]),
        ("[train]\nsteps = 4.5", ["train.steps", "whole number", "4.5"]),
        ("[train]\nsteps = true", ["train.steps", "whole number"]),
        ('[data]\npaths = "a.txt"', ["data.paths", "list of strings"]),
        ("[train]\nsteps = 0", ["train.steps", "greater than 0"]),
        ("[model]\nkv_heads = 5", ["model.heads", "model.kv_heads", "multiple"]),
        ("train = 3", ["[train]"]),
        ("[model", ["not valid TOML"]),
        ("\ufeff[model]", ["not valid TOML"]),
        ("a = " + "[" * 100_000, ["nested too deeply"]),
        ("[model]\nlayers = 1" + 5000 * "0", ["not valid TOML"]),
        ("[model]\nlayers = 0x" + 5000 * "f", ["model.layers", "64 bits"]),
        ("[model]\nrope_theta = 1" + 400 * "0", ["model.rope_theta", "64 bits"]),
        ("[model]\nrope_theta = nan", ["model.rope_theta"]),
        ("[model]\nlayers = 1_000_000_000_000", ["model.layers", "at most"]),
        ("[model]\nlayers = 2020-01-01", ["model.layers", "whole number"]),
        ("[model]\n" + 5000 * "x" + " = 1", ["unknown key 'xxx"]),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(toml, words, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as error:
        configs.load(path)
    for word in ["wrong.toml", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        configs.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"a = \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        configs.load(tmp_path / "binary.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match=r"can't read the configuration .*pipe\.toml: it is a pipe or a device"):
        configs.load(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="it is a folder"):
        configs.load(tmp_path)
    (tmp_path / "large.toml").touch()
    os.truncate(tmp_path / "large.toml", 2**40)
    with pytest.raises(UserError, match="it is too large"):
        configs.load(tmp_path / "large.toml")


def test_unknown_preset_names_the_near_ones():
    with pytest.raises(UserError, match=r"unknown preset '125m'; did you mean .*'124m'"):
        preset("125m")
    with pytest.raises(UserError, match=r"choose from 1\.5b, 124m"):
        preset("zzz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(heads=4, kv_heads=3), "model.heads .* multiple of model.kv_heads"),
        (lambda: ModelConfig(dim=100, heads=3, kv_heads=3), "model.dim"),
        (lambda: ModelConfig(dim=1024, heads=2), "at most 256"),
        (lambda: ModelConfig(layers=10**12), r"model\.layers must be at most 1,073,741,824, it is 1000000000000"),
        (lambda: ModelConfig(window=10**30), r"model\.window must be at most"),
        (lambda: ModelConfig(rope_theta=float("inf")), r"model\.rope_theta must be finite"),
        (lambda: ModelConfig(rope_theta=0.5), r"model\.rope_theta must be at least 1"),
        (lambda: ModelConfig(norm_eps=float("nan")), r"model\.norm_eps must be finite"),
        (lambda: ModelConfig(norm_eps=-1e-6), r"model\.norm_eps must be between 0 and 1"),
        (lambda: ModelConfig(rope_scaling="linear", rope_factor=float("inf")), r"model\.rope_factor must be finite"),
        (lambda: Config(model=ModelConfig(vocab_size=256)), "at least 257"),
        (lambda: ModelConfig(attention_dim=130, heads=4), r"model\.attention_dim \(130\) must be a multiple"),
        (lambda: ModelConfig(window=-1), r"model\.window must not be negative"),
        (lambda: ModelConfig(rope_scaling="dynamic"), "rope_scaling must be one of none, linear"),
        (lambda: ModelConfig(rope_scaling="linear", rope_factor=0.5), "rope_factor must be at least 1"),
        (lambda: ModelConfig(rope_scaling="yarn"), "'yarn' needs model.rope_original_max_seq_len"),
        (lambda: ModelConfig(rope_factor=2.0), "'none' has no model.rope_factor"),
        (
            lambda: ModelConfig(rope_scaling="linear", rope_factor=2.0, rope_original_max_seq_len=24),
            "'linear' has no model.rope_original_max_seq_len",
        ),
        (lambda: ModelConfig(layers=0), "model.layers must be greater than 0"),
        (lambda: TrainConfig(steps=-1), "train.steps"),
        (lambda: TrainConfig(precision="float8"), "auto, float32, bfloat16"),
        (lambda: OptimConfig(warmup_ratio=0.7, decay_ratio=0.7), "optim.warmup_ratio"),
        (lambda: OptimConfig(beta2=1.0), "optim.beta2"),
        (lambda: OptimConfig(optimizer="sgd"), "optim.optimizer must be one of adamw, muon, it is 'sgd'"),
        (lambda: OptimConfig(schedule="step"), "optim.schedule must be one of wsd, linear, cosine"),
        (lambda: OptimConfig(min_lr_ratio=1.5), "optim.min_lr_ratio must be between 0 and 1"),
        (lambda: DataConfig(validation=0.0), "data.validation"),
        (lambda: Config(train=TrainConfig(global_batch_tokens=1000)), "multiple of model.max_seq_len"),
    ],
)
def test_values_are_checked(make, message):
    with pytest.raises(UserError, match=message):
        make()
