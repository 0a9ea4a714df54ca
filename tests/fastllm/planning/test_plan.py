from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import scaling
from benchmarks.cases import OURS
from fastllm import config as configs
from fastllm.cli import main
from fastllm.config import Config, ModelConfig, ParallelConfig, TrainConfig
from fastllm.console import short
from fastllm.hardware import GPUS
from fastllm.model.flops import count_parameters, flops_per_token
from fastllm.planning import memory as planned
from fastllm.planning.memory import estimate_memory
from fastllm.planning.plan import Plan, duration
from fastllm.planning.presets import PRESETS
from fastllm.planning.scaling_laws import budget, model_of_depth, model_of_size

MODEL = ModelConfig(vocab_size=500, max_seq_len=64, dim=64, layers=6, heads=4, kv_heads=2, ffn_dim=96)


def configured(sequences: int = 64, micro_batch: int = 2, model: ModelConfig = MODEL, **parallel) -> Config:
    train = TrainConfig(global_batch_tokens=sequences * model.max_seq_len, micro_batch=micro_batch)
    return Config(model, train=train, parallel=ParallelConfig(**parallel))


# ---- formulas ----


def test_flops_are_those_that_pytorch_counts():
    """Of the matrix products; attention's by hand: each token sees half of the context and half a token."""
    from torch.utils.flop_counter import FlopCounterMode

    from fastllm.model.gpt import GPT

    model, tokens = GPT(MODEL), torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    attention = 12 * MODEL.layers * MODEL.dim * (64 + 1) / 2
    assert flops_per_token(MODEL) == round(counter.get_total_flops() / tokens.numel() + attention)


def test_a_window_saves_flops():
    every = [flops_per_token(replace(MODEL, window=window)) for window in (1, 32, 64, 100, 0)]
    assert every[0] < every[1] < every[2] == every[3] == every[4]
    seen = sum(min(i + 1, 32) for i in range(64)) / 64
    assert every[4] - every[1] == pytest.approx(12 * 6 * 64 * (32.5 - seen), abs=1)


@pytest.mark.parametrize("layers", [1, 4, 7, 16, 24, 33, 64])
def test_the_dial(layers):
    model = model_of_depth(layers)
    assert model.layers == layers
    assert model.dim == max(128, 64 * layers) or model.dim % 128 == 0
    assert model.heads % model.kv_heads == 0
    assert model_of_size(count_parameters(model)["total"]) == model


def test_settings_of_a_compute_optimal_run():
    """Of about 124M parameters: DeepSeek LLM's laws, worked out by hand for C = 1.97e18."""
    found = budget(PRESETS["124m"].model)
    assert found.tokens == pytest.approx(20 * 123.6e6, rel=0.01)
    assert found.flops == pytest.approx(1.97e18, rel=0.01)
    assert found.lr == pytest.approx(0.3118 * 1.97e18**-0.125, rel=0.05)
    assert 0.7 < found.global_batch_tokens / (0.2920 * 1.97e18**0.3271) < 1.42
    assert found.steps * found.global_batch_tokens == pytest.approx(found.tokens, rel=0.01)


def test_sizes_of_the_presets():
    """A preset has the parameters that its name says."""
    for name, config in PRESETS.items():
        match = re.fullmatch(r"([\d.]+)([mb])", name)
        if match:
            size = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]]
            assert count_parameters(config.model)["total"] == pytest.approx(size, rel=0.08), name


def test_words_for_numbers():
    assert [short(n) for n in (7, 1500, 65_536, 1.5e9, 2.5e12)] == ["7", "1.5k", "65.5k", "1.5B", "2.5T"]
    assert [duration(s) for s in (3, 300, 10_000, 1e6)] == ["3 s", "5.0 min", "2.8 h", "11.6 days"]


# ---- memory ----


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (1, {}),
        (8, {"reshard_after_forward": True}),
        (8, {"reshard_after_forward": True, "activation_checkpointing": "full", "tensor_parallel": 2}),
        (16, {"dp_replicate": 4, "activation_checkpointing": "selective"}),
    ],
)
def test_blocks_are_all_alike(processes, parallel, monkeypatch):
    """The dry run of a few layers, drawn out, is that of all."""
    monkeypatch.setattr("fastllm.distributed.parallelize.SINGLE_UNIT_LIMIT", 0)
    config = configured(**parallel)
    drawn_out = estimate_memory(config, processes, torch.bfloat16)
    whole = planned._dry_run(config, processes, torch.bfloat16)
    assert drawn_out.state == pytest.approx(whole.state, rel=1e-3)
    assert drawn_out.working == pytest.approx(whole.working, rel=0.01)


def test_state_is_shared_out():
    """12 bytes a parameter: float32 weights and two moments."""
    model = replace(MODEL, layers=3)  # of which each takes one dry run
    parameters = count_parameters(model)["total"]
    for shards, parallel in ((1, {}), (4, {}), (2, {"dp_replicate": 2})):
        state = estimate_memory(configured(model=model, **parallel), 4 if shards > 1 else 1, torch.bfloat16).state
        assert state == pytest.approx(12 * parameters / shards, rel=0.01)


def test_what_saves_memory_does():
    model = replace(MODEL, max_seq_len=512, layers=3)
    none, some, most = (
        estimate_memory(configured(model=model, activation_checkpointing=mode), 4, torch.bfloat16).working
        for mode in ("none", "selective", "full")
    )
    assert most < some < none
    assert estimate_memory(configured(model=model, tensor_parallel=2), 4, torch.bfloat16).working < 0.7 * none


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read, and set back, in /proc")
@pytest.mark.parametrize("parallel", [{}, {"activation_checkpointing": "full", "reshard_after_forward": True}])
def test_memory_is_what_a_run_takes(parallel):
    """Within 6 %, where malloc gives each large block a mapping of its own: else there are gaps, about a quarter."""
    model = replace(MODEL, vocab_size=8000, max_seq_len=256, dim=512, heads=8, ffn_dim=1408)
    config = configured(4, 2, model, **parallel)
    config = replace(config, train=replace(config.train, precision="float32"))
    point = scaling.Point(scaling.SIZE, 0, "", OURS, config.train.global_batch_tokens)
    measured = scaling._run(point, config, 0.0, scaling.EXACT)["memory"]
    assert measured > 100e6
    assert estimate_memory(config, 1, torch.float32).total == pytest.approx(measured, rel=0.06)


# ---- the command ----


def test_a_thousand_gpus(capsys):
    """Within seconds, and with the arithmetic of the data sheet."""
    assert main(["plan", "8b", "--gpus", "1024", "--mfu", "0.5"]) == 0
    printed = capsys.readouterr().out
    found = Plan(PRESETS["8b"], GPUS["h100"], 1024, 0.5)
    assert found.seconds == pytest.approx(found.flops / (1024 * 989e12 * 0.5))
    assert duration(found.seconds) in printed
    assert f"${found.dollars:,.0f}" in printed
    assert "1024" in printed


def test_a_file_for_training(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    assert main(["plan", "--params", "20e6", "--max-seq-len", "512", "--gpus", "1", "--out", str(path)]) == 0
    config = configs.load(path)
    assert count_parameters(config.model)["total"] == pytest.approx(20e6, rel=0.4)
    assert f"fastllm train {path}" in capsys.readouterr().out
    assert main(["plan", str(path), "--gpus", "2", "--activation-checkpointing", "full", "--gpu", "this"]) == 0
    printed = capsys.readouterr().out
    assert "activation_checkpointing full" in printed
    assert "$0.00 an hour" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("125m",), "'124m'"),
        (("none.toml",), "none.toml: No such file"),
        (("--gpu", "h10"), "did you mean 'h100'"),
        (("124m", "--depth", "3"), "give one of a preset or file, --depth and --params"),
        (("124m", "--gpus", "3", "--tensor-parallel", "2"), "must be a multiple of dp_replicate x tensor_parallel (2)"),
        (("124m", "--gpus", "4096"), "--gpus must be at most 256: the batch has 256 sequences"),
        (("124m", "--tensor-parallel", "5"), "must be a multiple of parallel.tensor_parallel (5)"),
        (("--depth", "-1"), "must be greater than 0"),
        (("124m", "--mfu", "2"), "--mfu must"),
        (("--out", "x.toml"), "--out writes one configuration"),
    ],
)
def test_a_mistake_gets_one_clear_line(words, message, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
