"""The speed and memory of tuning: full, LoRA and DoRA, and transformers with trl and peft on the same chats.

The peer is the stack as its users run it, with fastllm's kernels patched in: trl's SFTTrainer on the same weights, the
same chats in the same order of magnitude of tokens a step, the loss of the answers alone, the same optimizer. Both
count the tokens of the chats, not of padding. Each run is a process of its own; they take turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastllm.huggingface.export import export
from fastllm.training.metrics import read_log

from .posttraining import chat, items, write_lines

STEPS, CHATS_PER_STEP, TURNS = 7, 16, 2
WAYS: dict[str, tuple[str, ...]] = {
    "full": (),
    "LoRA, rank 16": ("--lora.rank", "16"),
    "DoRA, rank 16": ("--lora.rank", "16", "--lora.dora"),
}
LR = 1e-4


def speed(model: Path, folder: Path) -> dict[str, Any]:
    """Tokens a second of each way and of the peer, in turns; memory, parameters, and the curves of the loss."""
    train, _ = items(0)
    chats = [chat(item, item.code) for item in train] * 2
    data = write_lines(folder / "speed.jsonl", chats)
    hf = folder / "hf"
    if not hf.exists():
        export(model, hf)
    found: dict[str, list[dict[str, Any]]] = {}
    for _turn in range(TURNS):
        for name, options in WAYS.items():
            found.setdefault(name, []).append(_ours(hf, data, folder, options))
        for name, rank in (("transformers, trl: full", 0), ("transformers, trl, peft: LoRA, rank 16", 16)):
            found.setdefault(name, []).append(_theirs(hf, data, rank))
        for name, runs in found.items():
            print(f"{name}: {runs[-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    return {"ways": {name: _summary(runs) for name, runs in found.items()}}


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rates = [run["tokens_per_second"] for run in runs]
    rate = {"tokens_per_second": statistics.median(rates), "low": min(rates), "high": max(rates)}
    return {**runs[-1], **rate}


def _ours(model: Path, data: Path, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    out = folder / f"speed-{len(list(folder.glob('speed-*')))}"
    # Sequences of as many tokens as 16 chats have: so many chats a step.
    words = ["sft", model, "--data", data, "--optim.lr", LR, "--optim.schedule", "linear", "--optim.warmup-ratio", 0,
             "--train.steps", STEPS, "--train.batch-size", 1, "--train.micro-batch", 1, "--train.log-every", 1,
             "--train.eval-every", 1000, "--data.max-seq-len", 52 * CHATS_PER_STEP, "--data.validation", 0,
             "--checkpoint.every", 1000, *options, "--out", out]  # fmt: skip
    subprocess.run([sys.executable, "-m", "fastllm", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    records = [record for record in read_log(out / "log.jsonl") if "loss" in record]
    run = json.loads((out / "run.json").read_bytes())
    share = run["learnt_share"]
    # Of the steps after the first two.
    seconds = records[-1]["seconds"] - records[1]["seconds"]
    tokens = (records[-1]["tokens"] - records[1]["tokens"]) / share
    return {
        "tokens_per_second": tokens / seconds,
        "memory": records[-1]["memory"],
        "trainable": run["trainable_parameters"],
        "losses": [record["loss"] for record in records],
    }


PEER = """
import json, resource, sys, time
import torch, fastllm
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

model_path, data, rank, steps, batch, lr, out = sys.argv[1:]
dtype = torch.bfloat16
tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
fastllm.patch(model)
rows = [json.loads(line)["messages"] for line in open(data)]
rows = Dataset.from_list([{"prompt": r[:1], "completion": r[1:]} for r in rows])
peft = None
if int(rank):
    from peft import LoraConfig
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules=names, task_type="CAUSAL_LM")
times, losses = [], []

class Record(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        times.append(time.perf_counter())
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            losses.append(logs["loss"])

args = SFTConfig(
    out, max_steps=int(steps), per_device_train_batch_size=int(batch), learning_rate=float(lr), bf16=True,
    lr_scheduler_type="linear", warmup_steps=0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
    optim="adamw_torch_fused", gradient_checkpointing=False, max_length=512, weight_decay=0.0, adam_beta2=0.95,
    completion_only_loss=True, disable_tqdm=True, dataloader_drop_last=True,
)
data = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": peft}
trainer = SFTTrainer(model, args, callbacks=[Record()], **data)
lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
trainer.train()
trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
mean = sum(lengths) / len(lengths) - 1
print(json.dumps({
    "tokens_per_second": mean * int(batch) * (len(times) - 2) / (times[-1] - times[1]),
    "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "trainable": trained, "losses": losses,
}))
"""


def _theirs(model: Path, data: Path, rank: int) -> dict[str, Any]:
    words = (model, data, rank, STEPS, CHATS_PER_STEP, LR, data.parent / "trl")
    command = [sys.executable, "-c", PEER, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def speed_table(values: dict[str, Any]) -> str:
    ways = values["ways"]
    lines = [
        "| | tokens/s | spread | against the peer | memory, GiB | trained parameters | loss at the end |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    peers = {name.rpartition(": ")[2]: way["tokens_per_second"] for name, way in ways.items() if "trl" in name}
    for name, way in ways.items():
        ratio = f"{way['tokens_per_second'] / peers[name]:.2f}" if name in peers else ""
        lines.append(
            f"| {name} | {way['tokens_per_second']:,.0f} | {way['low']:,.0f}–{way['high']:,.0f} | {ratio} "
            f"| {way['memory'] / 2**30:.1f} | {way['trainable']:,} | {statistics.mean(way['losses'][-3:]):.3f} |"
        )
    return "\n".join(lines)
