"""The same numbers in one process and in several, however the model is sharded."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fastllm.config import ParallelConfig
from fastllm.distributed.mesh import ParallelDims, process_group
from fastllm.errors import UserError
from fastllm.training import muon
from tests.fastllm import ranks, small_run

SELECTIVE = {"activation_checkpointing": "selective"}
SHARDED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "one unit": {},
        "a unit for each block": {"reshard_after_forward": True},
        "replicas": {"dp_replicate": 2},
        "tensor parallel": {"tensor_parallel": 2},
        "full recompute": {"activation_checkpointing": "full", "reshard_after_forward": True},
        "selective recompute": SELECTIVE,
        "muon": {"optimizer": "muon"},
        "muon in bfloat16": {"optimizer": "muon", "bfloat16": True},
        "untied, windowed": {"tie_embeddings": False, "window": 5, "reshard_after_forward": True},
        "compiled": {"compile": True},
    },
    4: {
        "one unit": {},
        "hybrid": {"dp_replicate": 2, "reshard_after_forward": True},
        "hybrid and tensor": {"dp_replicate": 2, "tensor_parallel": 2},
        "sharded and tensor": {
            "tensor_parallel": 2,
            "reshard_after_forward": True,
            "activation_checkpointing": "selective",
        },
        "muon, tensor": {"optimizer": "muon", "tensor_parallel": 2},
        "muon in bfloat16, tensor": {"optimizer": "muon", "tensor_parallel": 2, "bfloat16": True},
        "parts of unequal size": {"ffn_dim": 50, "tensor_parallel": 2, "reshard_after_forward": True},
        "more processes than rows of some weights": {"head_dim_of": 2},
        "untied, tensor": {"tie_embeddings": False, "tensor_parallel": 2},
    },
}
# What decides the numbers; the rest of the options says how they are computed.
MEANING = {"optimizer", "tie_embeddings", "window", "ffn_dim", "bfloat16"}


def trace(options: dict[str, Any], out: Path) -> dict[str, Any]:
    """Muon multiplies in float32 on every machine, or with the option "bfloat16" in that."""
    options = dict(options)
    dtype = torch.bfloat16 if options.pop("bfloat16", False) else torch.float32
    if options.pop("head_dim_of", None):
        options |= {"dim": 24, "heads": 4, "kv_heads": 2, "attention_dim": 24}  # head norms of 6: 2, 2, 2 and none
    with mock.patch.object(muon, "compute_dtype", return_value=dtype):
        return small_run.trace(small_run.config(**options), out)


def run_cases(rank: int, world: int, folder: str) -> None:
    with process_group(small_run.CPU):
        for number, (name, options) in enumerate(SHARDED[world].items()):
            try:
                result = trace(options, Path(folder, f"{world}-{number}"))
                if rank == 0:
                    torch.save(result, Path(folder, f"{world}-{number}.pt"))
            except Exception:
                Path(folder, f"{world}-{number}.{rank}.error").write_text(f"{name}:\n{traceback.format_exc()}")
                raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for world in SHARDED:
        try:
            ranks.run(world, run_cases, world, str(folder))
        except Exception:
            errors = [path.read_text() for path in folder.glob("*.error")]
            raise AssertionError("\n".join(errors) or traceback.format_exc()) from None
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The trace of one process for these options, once for each meaning."""
    known: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("alone")

    def get(options: dict[str, Any]) -> dict[str, Any]:
        meaning = {k: v for k, v in options.items() if k in MEANING or k == "head_dim_of"}
        if str(meaning) not in known:
            with process_group(small_run.CPU):
                known[str(meaning)] = trace(meaning, folder / str(len(known)))
        return known[str(meaning)]

    return get


@pytest.mark.parametrize(
    ("world", "number"),
    [(world, i) for world, cases in SHARDED.items() for i in range(len(cases))],
    ids=[f"{world}: {name}" for world, cases in SHARDED.items() for name in cases],
)
def test_the_same_numbers(world, number, folder, alone):
    """Six steps, of which each would carry an error of the one before it further."""
    options = list(SHARDED[world].values())[number]
    actual = torch.load(folder / f"{world}-{number}.pt", weights_only=True)
    expected = alone(options)
    assert len(expected["curve"]) == 6
    assert actual["gradients"].keys() == expected["gradients"].keys()
    if options.get("bfloat16"):
        rounds_alike(actual, expected, alone(options | {"bfloat16": False}))
        return
    torch.testing.assert_close(actual["curve"], expected["curve"], rtol=5e-6, atol=0)
    torch.testing.assert_close(actual["validation"], expected["validation"], rtol=5e-6, atol=0)
    for name, gradient in expected["gradients"].items():
        assert (actual["gradients"][name] - gradient).norm() <= 2e-4 * gradient.norm(), name
    for name, weight in expected["weights"].items():
        assert (actual["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name


def rounds_alike(actual: dict[str, Any], alone: dict[str, Any], exact: dict[str, Any]) -> None:
    """The rule for numerics: the error of ``actual`` is at most twice that of one process, for the same dtype.

    Gradients that differ in their last float32 bit, as sums in another order do, round to bfloat16 numbers that differ
    by 2⁻⁸ of them, and five iterations with a slope of 3.4 near 0 enlarge that. So two runs are apart by as much as
    each is from the run in float32, which the other cases hold to the last digits. Of all weights together, and all
    gradients, each tensor in units of its size: over thousands of roundings the two errors are of one length. Loss
    and gradient norm follow from the weights; before the first update they are the same.
    """
    for kind in ("weights", "gradients"):

        def error(run: dict[str, Any], kind: str = kind) -> float:
            return sum((run[kind][n] - t).norm().item() ** 2 / t.norm().item() ** 2 for n, t in exact[kind].items())

        assert 0 < error(actual) <= 2**2 * error(alone), kind
    torch.testing.assert_close(actual["curve"][0], alone["curve"][0], rtol=5e-6, atol=0)


def test_the_model_learns(alone):
    curve = alone({})["curve"]
    assert curve[-1, 0] < curve[0, 0] - 0.2


def test_processes_that_do_not_fit():
    with process_group(small_run.CPU), pytest.raises(UserError, match=r"start a multiple of 4 with torchrun"):
        ParallelDims.from_config(ParallelConfig(dp_replicate=2, tensor_parallel=2), "cpu")


class Problem(Exception):
    pass


def end_first(rank: int) -> None:
    with process_group(small_run.CPU) as heartbeat:
        heartbeat.advice = "do this"
        dist.barrier()  # rank 0 keeps the store, to which the other's heartbeat connects
        if rank == 0:
            raise Problem


def lose_rank0(rank: int) -> None:
    said = r"rank 1 of 2 lost the connection to another rank, which ended first: see its message\. do this \("
    with pytest.raises(UserError, match=said) if rank else pytest.raises(Problem):
        end_first(rank)


def test_a_rank_that_ends_outside_of_training():
    """As it prepares the data, or after the weights: the others end with a line."""
    ranks.run(2, lose_rank0)


def test_a_model_that_does_not_split():
    with pytest.raises(UserError, match=r"model.kv_heads \(2\) must be a multiple of parallel.tensor_parallel \(4\)"):
        small_run.config(tensor_parallel=4)
