"""The commands that use a trained model: ``fastllm generate`` and ``fastllm chat``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from . import arguments
from .errors import ParameterError, UserError

if TYPE_CHECKING:
    from .inference import Engine, SamplingParams

MODEL = (
    """MODEL is a run folder of fastllm train, a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3), or a GGUF file."""
)


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """How a model is run."""

    model: tyro.conf.Positional[Path]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where the device multiplies it
    quantize: Literal["none", "int8"] = "none"  # int8: weights of 8 bits, less memory and reading
    max_seq_len: int | None = None  # tokens of prompt and answer; none: what the model sees
    max_batch: int = 32  # requests that run at once
    kv_tokens: int | None = None  # tokens whose keys and values are held; none: what max-batch needs and memory allows
    speculate: int = 0  # tokens to guess in each step; the answer stays the same
    draft: Path | None = None  # a smaller model that guesses; none: what followed the latest words earlier


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    """How tokens are chosen."""

    max_tokens: int = 200  # stop after this many tokens, if the model does not end the text before
    temperature: float = 0.8  # below 1 makes likely tokens likelier; 0 takes the most likely token
    top_k: int = 50  # choose among this many most likely tokens; 0: all
    top_p: float = 1.0  # choose among the most likely tokens that reach this probability together
    min_p: float = 0.0  # leave out tokens less likely than this share of the most likely one's probability
    repetition_penalty: float = 1.0  # above 1 makes tokens that were there less likely
    stop: tuple[str, ...] = ()  # texts before which the answer ends

    def params(self, seed: int | None) -> SamplingParams:
        from .inference import SamplingParams

        try:
            return SamplingParams(
                max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
                min_p=self.min_p, repetition_penalty=self.repetition_penalty, stop=self.stop, seed=seed,
            )  # fmt: skip
        except ParameterError as error:
            raise UserError("--" + str(error).replace(error.name, error.name.replace("_", "-"), 1)) from None


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(SamplingArguments, EngineArguments):
    """Continue a text, or the prompts of a file.

    MODEL is a run folder of fastllm train, a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3), or a GGUF file.
    A file of prompts has a JSON object a line with "prompt", or with "messages" for the model's chat template; further
    keys are kept, and keys of the options above (max_tokens, temperature, seed …) hold for their line. Each line of
    the output is that object with "text", "finish_reason" and the numbers of tokens ("n" of them: "texts").
    """

    prompt: str = ""  # the text to continue
    prompts: Path | None = None  # a file of prompts: JSON lines, or .txt with a prompt a line
    out: Path | None = None  # where their answers go, as JSON lines; none: standard output
    seed: int = 0  # the same seed gives the same text


@dataclass(frozen=True, kw_only=True)
class ChatArguments(SamplingArguments, EngineArguments):
    """Chat with a model in the terminal.

    MODEL is a run folder of fastllm train, a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3), or a GGUF file, with
    a chat template. Ctrl-C stops an answer; /help lists what else can be done.
    """

    max_tokens: int = 1024  # of an answer
    system: str = ""  # what the model is told first
    seed: int | None = None  # the same seed and the same words give the same answers


ARGUMENTS: dict[str, type] = {"generate": GenerateArguments, "chat": ChatArguments}


def make_engine(chosen: EngineArguments) -> Engine:
    """The engine of a command's MODEL, on the GPU where there is one."""
    import torch

    from .hardware import compute_dtype
    from .inference import Engine
    from .inference.load import load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(device) if chosen.dtype == "auto" else getattr(torch, chosen.dtype)
    model, tokenizer = load(chosen.model, device, dtype=dtype)
    draft = None if chosen.draft is None else load(chosen.draft, device, dtype=dtype)[0]
    return Engine(
        model, tokenizer, max_batch=chosen.max_batch, max_seq_len=chosen.max_seq_len, kv_tokens=chosen.kv_tokens,
        quantize=None if chosen.quantize == "none" else chosen.quantize, speculate=chosen.speculate,
        draft=draft or "prompt",
    )  # fmt: skip


def note_early_end(model: Path) -> None:
    """Say so where a run folder is of a training that ended early."""
    from . import run_dir
    from .training.final_weights import read_record

    record = read_record(model) if model.is_dir() else None
    if record is not None and not record.finished:
        early = f"ended early, at step {record.step} of {run_dir.load_metadata(model).get('steps')}"
        print(f"fastllm: note: this run {early}", file=sys.stderr)


def generate(argv: list[str]) -> int:
    chosen = arguments.parse(GenerateArguments, "fastllm generate", argv)
    params = chosen.params(chosen.seed)
    if chosen.prompts is None and chosen.out is not None:
        raise UserError("--out goes with --prompts")
    if chosen.prompts is not None and chosen.prompt:
        raise UserError("--prompt and --prompts exclude each other")

    from .inference.prompt_files import answer_file

    engine = make_engine(chosen)
    note_early_end(chosen.model)
    try:
        if chosen.prompts is not None:
            return answer_file(engine, chosen.prompts, chosen.out, params)
        prompt = engine.prompt(chosen.prompt)
        print(chosen.prompt, end="", flush=True)
        reason = None
        try:
            for delta in engine.stream(prompt, params):
                print(delta.text, end="", flush=True)
                reason = delta.finish_reason
        finally:
            print()
    except ParameterError:
        raise
    except UserError as error:
        raise UserError(f"{chosen.model}: {error}") from None
    if reason == "length" and len(prompt.tokens) + params.max_tokens > engine.max_seq_len:
        print(f"fastllm: note: the context of {engine.max_seq_len:,} tokens is full", file=sys.stderr)
    return 0


def chat(argv: list[str]) -> int:
    chosen = arguments.parse(ChatArguments, "fastllm chat", argv)
    params = chosen.params(chosen.seed)

    from .inference.chat import chat

    engine = make_engine(chosen)
    if engine.tokenizer.chat_template is None:
        raise UserError(f"{chosen.model} has no chat template, it was not trained to chat: see fastllm generate")
    return chat(engine, chosen.model.name, params, chosen.system)
