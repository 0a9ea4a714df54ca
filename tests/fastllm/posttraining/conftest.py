from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastllm.config import ParallelConfig
from fastllm.distributed.mesh import ParallelDims, process_group
from tests.fastllm import small_run

from . import small_tune


@pytest.fixture
def dims() -> Iterator[ParallelDims]:
    """This process alone."""
    with process_group(small_run.CPU):
        yield ParallelDims.from_config(ParallelConfig(), "cpu")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A run folder of a model that says anything, with the tokens of ChatML in its vocabulary."""
    return small_tune.save_run(tmp_path_factory.mktemp("base") / "run", small_tune.small_gpt(), small_tune.tokenizer())
