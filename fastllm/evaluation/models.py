"""The models that are evaluated: those of fastllm's GPT, and others of transformers with the kernels put in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data.chat_template import read_chat_template
from ..data.tokenizer import Tokenizer
from ..errors import UserError, pip_install
from ..huggingface.load import CONFIG, TOKENIZER
from ..huggingface.model_config import DEFAULTS
from ..inference import Engine, Prompt, SamplingParams
from ..inference.load import load
from ..input_files import one_line, read_json
from ..model.gpt import GPT
from ..run_dir import GENERATION, read_eos_ids
from .scoring import GPTScorer, Scorer
from .task import Generation


class Model(Scorer, Protocol):
    """What an evaluation asks of a model."""

    tokenizer: Tokenizer
    name: str  # for results

    def generate(self, prompts: Sequence[Sequence[int]], how: Generation) -> Iterator[tuple[int, str]]:
        """The answers to prompts by their places, as they are ready: the most likely token each time."""
        ...


class GPTModel(GPTScorer):
    """A GPT of fastllm: scores by :class:`GPTScorer`, answers by the inference engine."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str = "GPT", *, rows: int | None = None) -> None:
        super().__init__(model, rows=rows)
        self.tokenizer, self.name = tokenizer, name

    def generate(self, prompts: Sequence[Sequence[int]], how: Generation) -> Iterator[tuple[int, str]]:
        longest = max(map(len, prompts)) + how.max_tokens
        engine = Engine(self.gpt, self.tokenizer, max_seq_len=min(longest, self.max_seq_len))
        params = SamplingParams(max_tokens=how.max_tokens, temperature=0.0, stop=how.stop)
        places = {}
        for place, prompt in enumerate(prompts):
            (request,) = engine.add(Prompt([*prompt]), params)
            places[request] = place
        while engine.busy:
            for request in engine.step():
                if request.finish_reason is not None:
                    yield places[request], request.completion().text


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """The model at ``path``: a run folder, a GGUF file, or a Hugging Face folder of any causal language model.

    Raises:
        UserError: there is none, it can't be read, or transformers has no such model.
    """
    if not path.exists():
        raise UserError(f"there is no model {path}: no run folder, Hugging Face folder or GGUF file")
    config = path / CONFIG
    if config.is_file() and read_json(config).get("model_type") not in [*DEFAULTS]:
        return _load_theirs(path, device, dtype)
    model, tokenizer = load(path, device, dtype=dtype)
    return GPTModel(model, tokenizer, path.name)


def _load_theirs(path: Path, device: torch.device, dtype: torch.dtype) -> Model:
    try:
        import transformers
    except ImportError:
        kind = read_json(path / CONFIG).get("model_type")
        raise UserError(f"{path} is a {kind}, which needs transformers: {pip_install('hf')}") from None
    from ..huggingface.patching import patch
    from .transformers_model import TransformersModel

    if not (path / TOKENIZER).is_file():
        raise UserError(f"{path} has no {TOKENIZER}")
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # of any kind, by what is wrong in the files
        raise UserError(f"transformers can't load {path}: {type(error).__name__}: {one_line(error)}") from error
    model, loading = found
    lacking = sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])])
    if lacking:
        raise UserError(f"the weights of {path} don't fit its {CONFIG}: {', '.join(lacking[:3])} would be random")
    model.to(device).eval()
    patch(model)
    vocab_size = len(model.get_output_embeddings().weight)
    tokenizer = Tokenizer.load(path / TOKENIZER, read_eos_ids(vocab_size, path / GENERATION, path / CONFIG))
    tokenizer.chat_template = read_chat_template(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path}: {TOKENIZER} has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    adapted = TransformersModel(model, tokenizer, path.name)
    if not adapted.is_causal():
        raise UserError(f"{path}: a token of {type(model).__name__} sees those after it; tasks need a causal model")
    return adapted
