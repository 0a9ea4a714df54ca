"""Rollouts: completions that the model being trained samples, by the inference engine, and their rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..data.permutation import key_of
from ..data.tokenizer import Tokenizer
from ..distributed.mesh import ParallelDims
from ..errors import UserError
from ..files import write_atomic
from ..inference import Engine, Prompt, SamplingParams
from ..training.inference_model import inference_model
from .base import merge_of
from .config import RewardConfig
from .examples import Examples
from .rewards import RewardPool, Sample

MOST_AT_ONCE = 64  # completions that the engine runs at once


@dataclass
class Completed:
    """A completion of the prompt in row ``row``, and what the policy knew of its tokens."""

    row: int
    text: str
    tokens: list[int]
    log_probs: list[float]  # by the engine, at temperature 1
    truncated: bool
    reward: float | None = None
    problem: str = ""  # why there is no reward
    old: list[float] | None = None  # by the trainer's model, before the rollout's first update
    reference: list[float] | None = None  # by the model that training began with


class Sampler:
    """Samples completions of prompts and has them rewarded.

    The engine is made for each rollout of the weights as they are, and freed before the training that follows.

    Args:
        prompts: the tokens of the prompts.
        rows: the messages and other columns of each prompt, for the reward function.
        pool: computes rewards.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: Tokenizer,
        dims: ParallelDims,
        precision: torch.dtype,
        prompts: Examples,
        rows: Sequence[dict[str, Any]],
        pool: RewardPool,
    ) -> None:
        self.config, self.tokenizer, self.dims, self.precision = config, tokenizer, dims, precision
        self.prompts, self.rows, self.pool = prompts, rows, pool

    def sample(
        self, model: nn.Module, rows: Sequence[int], seeds: Sequence[int], n: int, temperature: float
    ) -> list[Completed]:
        """``n`` completions of the prompts in ``rows``, each with a seed of its own; on every rank all of them.

        All ranks call this together; each samples its share.
        """
        gpt = inference_model(model, self.config.model, self.precision, merge_of(self.config, self.precision))
        own = self.dims.local_batch(len(rows))
        found: list[Completed] = []
        if own:
            chosen = [rows[i] for i in own]
            longest = max(int(self.prompts.lengths[row]) for row in chosen)
            options = self.config.grpo
            engine = Engine(
                gpt, self.tokenizer, max_batch=min(MOST_AT_ONCE, n * len(own)), max_seq_len=longest + options.max_tokens
            )
            del gpt  # the engine has packed it
            params = SamplingParams(max_tokens=options.max_tokens, temperature=temperature, n=n)
            requests = []
            for row, i in zip(chosen, own, strict=True):
                prompt = Prompt(self.prompts.sequence(row)[0].tolist())
                requests += [(row, request) for request in engine.add(prompt, replace(params, seed=seeds[i]))]
            while engine.busy:
                engine.step()
            for row, request in requests:
                answer = request.completion()  # raises where the logits were not finite
                found.append(
                    Completed(row, answer.text, answer.tokens, answer.logprobs, answer.finish_reason == "length")
                )
            del engine
        self._reward(found)
        return self._shared(found)

    def _reward(self, found: list[Completed]) -> None:
        samples = []
        for completed in found:
            values = self.rows[completed.row]
            samples.append(Sample(values["messages"], completed.text, values["row"]))
        for completed, score in zip(found, self.pool.score(samples), strict=True):
            completed.reward, completed.problem = score.value, score.problem

    def _shared(self, own: list[Completed]) -> list[Completed]:
        """Those of all ranks, in the order of the prompts. Ranks that share sequences have sampled the same ones."""
        if dist.get_world_size() == 1:
            return own
        every: list[list[dict[str, Any]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, [asdict(completed) for completed in own])
        return [Completed(**values) for part in every[:: self.dims.tp_size] for values in part or []]


def seed_of(seed: int, item: int) -> int:
    """Of the random numbers of an item's completions."""
    return key_of(seed, item) >> 1


# ---- what a resumed run reads again ----


def save_rollout(path: Path, found: Sequence[Completed]) -> None:
    write_atomic(path, json.dumps([asdict(completed) for completed in found]).encode())


def load_rollout(path: Path) -> list[Completed]:
    """Raises UserError where it can't be read."""
    try:
        return [Completed(**values) for values in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"can't read the rollout {path}: {error}") from None


def rewards_of(found: Sequence[Completed]) -> np.ndarray:
    """float32; NaN where there is none."""
    return np.array([np.nan if c.reward is None else c.reward for c in found], np.float32)
