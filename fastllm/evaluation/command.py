"""What ``fastllm eval`` does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from .. import __version__, console
from ..errors import UserError
from ..evaluation_commands import EvalArguments
from ..hardware import compute_dtype
from . import results
from .contamination import contaminated
from .items import Options, prepare
from .models import load_model
from .perplexity import perplexity, read_documents
from .rows import installed_data
from .run import Log, Sample, ask, read_samples, summary
from .tasks import find_tasks


def evaluate_model(chosen: EvalArguments) -> int:
    """Evaluate, print a table, and write the results where ``--out`` says."""
    tasks = find_tasks(chosen.tasks, chosen.subjects, chosen.shots)
    other = _other(chosen.compare) if chosen.compare else None
    documents = read_documents(chosen.text) if chosen.text else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(device) if chosen.dtype == "auto" else getattr(torch, chosen.dtype)
    model = load_model(chosen.model, device, dtype)
    data = chosen.data or installed_data()
    options = Options(chosen.limit, chosen.chat, chosen.too_long, chosen.skip_bad_rows)
    with console.working("reading the tasks"):
        prepared = [prepare(task, data, model.tokenizer, model.max_seq_len, options) for task in tasks]
    began = time.monotonic()
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": device.type, "data": str(data) if tasks else None,
                "chat": chosen.chat or None, "fastllm": __version__}  # fmt: skip
    found: dict[str, Any] = {"model": str(chosen.model), "settings": settings, "tasks": {}}
    identity = {"model": model_identity(chosen.model), "dtype": settings["dtype"]}
    log = Log(chosen.out.with_suffix(".samples.jsonl"), identity) if chosen.out else None
    known = log.open() if log else {}
    samples: dict[str, list[Sample]] = {}
    try:
        for part in prepared:
            samples[part.task.name] = own = ask(model, part, known, log)
            found["tasks"][part.task.name] = summary(part, own, chosen.limit)
    finally:
        if log:
            log.close()
    if documents:
        found["tasks"]["text"] = perplexity(model, documents, chosen.stride)
    found["seconds"] = time.monotonic() - began
    if chosen.contamination:
        for name, overlap in contaminated(prepared, samples, chosen.contamination).items():
            found["tasks"][name]["contamination"] = overlap
    if other is not None:
        compared = results.compare({s.key: s for own in samples.values() for s in own}, other)
        found["comparison"] = {"model": results.read_results(chosen.compare or Path())["model"], "tasks": compared}
    console.console.print(results.table(found))
    for line in results.markdown({**found, "tasks": {}}).splitlines()[8:] if other is not None else ():
        console.console.print(line)
    if chosen.out:
        results.write_results(chosen.out, found)
    return 0


def _other(path: Path) -> dict[tuple[str, str, int], Sample]:
    """The samples beside the results of another model."""
    results.read_results(path)
    file = path.with_suffix(".samples.jsonl")
    if not file.is_file():
        raise UserError(f"--compare: there is no {file} beside {path}, with the answers")
    return read_samples(file)[0]


def model_identity(path: Path) -> list[Any]:
    """What tells a model's files from others: their names, sizes and times."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("tokenizer.json")])
    return [str(path.resolve()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
