"""The stages of a preparation as pipelines of datatrove: on a cluster with Slurm or Ray, or in local processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError, require_packages
from .prepare import begun, open_files
from .recipe import Recipe
from .stages import PLAN, Preparation

Executor = Literal["local", "slurm", "ray"]


@dataclass(frozen=True)
class SlurmOptions:
    """What Slurm asks for."""

    partition: str = ""  # of the cluster
    time: str = "24:00:00"  # that a task may take
    mem_per_cpu_gb: int = 4
    setup: str = ""  # a command that activates the Python environment


def prepare_with_datatrove(
    recipe: Recipe,
    out: Path,
    executor: Executor,
    tasks: int = 0,
    workers: int = 0,
    slurm: SlurmOptions | None = None,
) -> bool:
    """As :func:`fastllm.data.corpus.prepare.prepare`, in tasks that datatrove runs, each of which can be restarted.

    The folder ``out`` and the sources must be on a file system that all machines share. With Slurm the call submits
    the jobs and returns; a rerun submits what is not done.

    Args:
        recipe, out: see there.
        executor: datatrove's: "local" (processes), "slurm" or "ray".
        tasks: that the files are shared among; 0: one for each file, at most 1,000.
        workers: tasks that run at once; 0: as many as there are, or with "local" as there are cores.
        slurm: for "slurm".

    Returns:
        Whether the corpus is complete now.
    """
    require_packages(f"--executor {executor}", "datatrove", install='pip install "datatrove>=0.10"')
    files = open_files(recipe)
    preparation = Preparation(recipe, files, out.resolve(), tasks or min(len(files), 1000))
    with begun(preparation) as anything:
        if not anything:
            return True
        make = _maker(executor, preparation.out / "datatrove", workers, slurm)
        stages: list[tuple[str, int, Callable[..., Any]]] = [
            ("clean", preparation.tasks, _clean),
            ("buckets", preparation.bands, _buckets),
            ("decide", 1, _decide),
            ("shards", preparation.tasks, _shards),
            ("finish", 1, _finish),
        ]
        last: Any = None
        for name, count, call in stages:
            if count:
                last = make(name, count, partial(call, preparation), last)
        last.run()
    return not preparation.work.exists()


def _maker(
    executor: Executor, logs: Path, workers: int, slurm: SlurmOptions | None
) -> Callable[[str, int, Callable[..., Any], Any], Any]:
    """Makes datatrove's executor of a stage, from its name, number of tasks, function and the executor before it."""

    def make(name: str, tasks: int, call: Callable[..., Any], before: Any) -> Any:
        shared: dict[str, Any] = {
            "pipeline": [call],
            "tasks": tasks,
            "workers": workers or -1,
            "logging_dir": str(logs / name),
            "depends": before,
        }
        if executor == "local":
            from datatrove.executor.local import LocalPipelineExecutor

            shared["workers"] = workers or len(os.sched_getaffinity(0))
            return LocalPipelineExecutor(**shared, start_method="spawn")
        if executor == "ray":
            from datatrove.executor.ray import RayPipelineExecutor

            return RayPipelineExecutor(**shared)
        from datatrove.executor.slurm import SlurmPipelineExecutor

        options = slurm or SlurmOptions()
        if not options.partition:
            raise UserError("--executor slurm needs the cluster's partition: --partition NAME")
        return SlurmPipelineExecutor(
            **shared,
            time=options.time,
            partition=options.partition,
            mem_per_cpu_gb=options.mem_per_cpu_gb,
            job_name=f"fastllm-{name}",
            env_command=options.setup or None,
            mail_type="NONE",
        )

    return make


# A step of a datatrove pipeline: (documents, rank, number of tasks) to documents, of which there are none here.


def _clean(preparation: Preparation, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> list[Any]:
    preparation.clean(rank)
    return []


def _buckets(preparation: Preparation, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> list[Any]:
    preparation.buckets(rank)
    return []


def _decide(preparation: Preparation, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> list[Any]:
    preparation.decide()
    return []


def _shards(preparation: Preparation, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> list[Any]:
    preparation.shards(rank, world_size)
    return []


def _finish(preparation: Preparation, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> list[Any]:
    began = (preparation.out / PLAN).stat().st_mtime
    preparation.finish(time.time() - began)
    return []
