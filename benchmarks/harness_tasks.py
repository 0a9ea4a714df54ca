"""Tasks of lm-evaluation-harness on files of this machine, for comparisons with it (pip install lm-eval)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from fastllm.evaluation.rows import find_split
from fastllm.evaluation.task import SHOTS_SEED

KINDS = {".jsonl": "json", ".json": "json", ".arrow": "arrow", ".parquet": "parquet"}  # what `datasets` calls them


@cache
def _manager() -> TaskManager:
    return TaskManager()


def harness_task(name: str, folder: Path, shots: int, generation: Mapping[str, Any] | None = None) -> ConfigurableTask:
    """The harness's task, with the rows in a folder in place of those of the Hub.

    Where there is no test split it asks the validation split, as fastllm does. ``generation``: settings in place of its
    own.
    """
    splits = {split: find_split(folder, split) for split in ("train", "dev", "validation", "test")}
    files = {split: [str(file) for file in found] for split, found in splits.items() if found}
    (kind,) = {KINDS[file.suffix] for found in splits.values() for file in found}
    config = load_yaml(_manager().task_index[name].yaml_path)
    config |= {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    if generation:
        config["generation_kwargs"] |= generation
    if config.get("test_split") and not splits["test"]:
        config["test_split"] = "validation"
    if config.get("training_split") and not splits["train"]:
        del config["training_split"]  # of which it would make shots, also where none are asked for
    task = ConfigurableTask(config=config)
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(SHOTS_SEED)
    return task
