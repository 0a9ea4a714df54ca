"""A small GPT with a tokenizer, made in a moment, and files of questions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllm.config import ModelConfig
from fastllm.data.chat_template import ChatTemplate
from fastllm.data.tokenizer import Tokenizer
from fastllm.evaluation import GPTModel
from fastllm.model.gpt import GPT

TEXT = "Question: What is the capital of France? Answer: Paris. A. London B. Paris C. Rome D. Berlin\n" * 3
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" \
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip


def model(max_seq_len: int = 256, *, chat: bool = False, seed: int = 0) -> GPTModel:
    tokenizer = Tokenizer.train([TEXT], 400, chat=True)
    if chat:
        tokenizer.chat_template = ChatTemplate(TEMPLATE)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64
    )
    gpt = GPT(config, seed).eval()
    for name, p in gpt.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # zero at first
            p.data.normal_(0, 0.2)
    return GPTModel(gpt, tokenizer, "small")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mmlu_rows(n: int, first: int = 0) -> list[list[str]]:
    """Question, four choices, letter."""
    return [[f"What is {i} + 1?", *(str(i + k) for k in range(4)), "B"] for i in range(first, first + n)]


def write_mmlu(folder: Path, subjects: Sequence[str], n: int = 3, split: str = "test", first: int = 0) -> Path:
    """The benchmark's own layout."""
    for subject in subjects:
        path = folder / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(mmlu_rows(n, first))
    return folder
