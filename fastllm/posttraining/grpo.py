"""Reinforcement learning with rewards that a function computes: GRPO, Dr. GRPO and DAPO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import console
from ..data.loader import IGNORE_INDEX, Batch, cu_seqlens_of
from ..data.permutation import key_of, permuted
from ..data.tokenizer import Tokenizer
from ..distributed.mesh import ParallelDims, run_on_all_ranks
from ..distributed.parallelize import parallelize
from ..errors import UserError
from ..files import write_atomic
from ..inference.load import load
from ..kernels import linear_log_prob
from ..training.metrics import read_log
from ..training.micro_batches import to_device
from ..training.objectives import Loss
from ..training.plot import Panel
from .config import RewardConfig
from .conversations import Prompt, read_prompts
from .datasets import encoded, finish, learnt, mixture_of, places_of, sources, weights_of
from .examples import Examples, ExamplesBuilder, joined
from .losses import advantages, kl_estimate, policy_loss
from .preferences import AnswerData
from .rendering import FAILS, TOO_LONG, Encoded, Refused
from .rewards import RewardPool
from .rollouts import Completed, Sampler, load_rollout, rewards_of, save_rollout, seed_of
from .rows import Report
from .run import EXAMPLES, Context, Task, prepare_model

PROMPTS = "prompts.jsonl"  # in a run folder: the messages and other columns of each prompt
COMPLETIONS = "completions.jsonl"  # what was sampled, and its rewards
ROLLOUTS = "rollouts"  # rollouts that more than one update learns from
RESAMPLE = 3  # times that dapo replaces prompts whose completions all have the same reward
MANY_TRUNCATED = 0.5  # share of completions that is worth a warning
USUAL_CLIP_HIGH = {"dapo": 0.28}  # others: clip_low


class PromptData(AnswerData):
    """The rows of prompts that are the items of a run; a batch has their numbers alone."""

    def batch(self, index: int, n: int) -> Batch:
        return {"prompt": torch.tensor(self.numbers(index, n))}

    def padding(self) -> Batch:
        return {"prompt": torch.tensor([-1])}


class PolicyObjective:
    """The clipped policy loss of sampled completions, with the advantages of their rewards in their groups.

    Every ``grpo.updates`` steps it samples completions of these steps' prompts; each step learns from those of its own.
    """

    def __init__(self, context: Context, sampler: Sampler, data: PromptData, reference: nn.Module | None) -> None:
        self.config, self.dims, self.device = context.config, context.dims, context.device
        self.folder, self.sampler, self.data, self.reference = context.folder, sampler, data, reference
        self.options = self.config.grpo
        self.clip_high = self.options.clip_high or USUAL_CLIP_HIGH.get(self.options.variant, self.options.clip_low)
        kl = ("kl",) * (reference is not None)
        self.metric_names: tuple[str, ...] = (*METRICS, *kl)
        self._rollout: tuple[int, list[Completed]] | None = None  # its number

    # ---- rollouts ----

    def begin_step(self, model: nn.Module, step: int, index: int, batches: list[Batch]) -> list[Batch]:
        n = self.config.items_per_step
        number, update = divmod(index // n, self.options.updates)
        if self._rollout is None or self._rollout[0] != number:
            self._rollout = number, self._begin_rollout(model, number, update)
        per_step = n * self.options.group
        return self._batches(self._rollout[1][update * per_step : (update + 1) * per_step])

    def _begin_rollout(self, model: nn.Module, number: int, update: int) -> list[Completed]:
        path = self.folder / ROLLOUTS / f"rollout-{number:08d}.json"
        if update:  # resumed between two updates
            return run_on_all_ranks(lambda: load_rollout(path))
        model.eval()
        found = self._sample(model, number)
        if self.options.updates > 1:
            self._fill(model, found, "old")
        if self.reference is not None:
            self._fill(self.reference, found, "reference")
        model.train()
        if dist.get_rank() == 0:
            self._record(number, found)
            if self.options.updates > 1:
                path.parent.mkdir(exist_ok=True)
                save_rollout(path, found)
                kept = (self.config.checkpoint.keep + 1) * self.config.checkpoint.every // self.options.updates + 2
                (path.parent / f"rollout-{number - kept:08d}.json").unlink(missing_ok=True)
        return found

    def _sample(self, model: nn.Module, number: int) -> list[Completed]:
        """The completions of a rollout, ``group`` of each of its prompts, one prompt after another."""
        options, seed = self.options, self.config.train.seed
        n = self.config.items_per_step * options.updates
        rows = self.data.numbers(number * n, n)
        slots: list[list[Completed]] = [[] for _ in rows]
        wanted = list(range(n))
        for attempt in range(RESAMPLE + 1 if options.variant == "dapo" else 1):
            seeds = [seed_of(seed, (number * n + slot) * (RESAMPLE + 1) + attempt) for slot in wanted]
            found = self.sampler.sample(model, [rows[i] for i in wanted], seeds, options.group, options.temperature)
            for place, slot in enumerate(wanted):
                slots[slot] = found[place * options.group : (place + 1) * options.group]
            wanted = [slot for slot in wanted if not _differ(slots[slot])]
            if not wanted:
                break
            # Other prompts in their places, drawn for this attempt.
            places = permuted(np.arange(len(wanted)) % len(self.data), len(self.data), key_of(seed, number, attempt, 7))
            for slot, row in zip(wanted, self.data.rows[places].tolist(), strict=True):
                rows[slot] = row
        return [completed for group in slots for completed in group]

    def _fill(self, model: nn.Module, found: list[Completed], name: str) -> None:
        """Set ``name`` of each completion to its tokens' log-probabilities by ``model``, at the temperature."""
        filled: dict[int, list[float]] = {}
        size, own = self.config.train.micro_batch, self._own(found)
        most = self.dims.max_local_batch(len(found) // self.options.group) * self.options.group
        for first in range(0, most, size):
            part = own[first : first + size]
            batch = self._packed([(found[place], 0.0) for place in part])
            with torch.no_grad():
                log_prob, _, _ = self._log_probs(model, to_device(batch, self.device), entropy=False)
            values = log_prob.tolist() if self.dims.tp_size == 1 else self._whole(batch, log_prob)
            start = 0
            for place in part:
                end = start + len(found[place].tokens)
                filled[place] = values[start:end]
                start = end
        every: list[Any] = [filled]
        if dist.get_world_size() > 1:
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, filled)
        for part in every:
            for place, values in part.items():
                setattr(found[place], name, values)

    def _whole(self, batch: Batch, log_prob: Tensor) -> list[float]:
        """The values of the learnt tokens, of which each of the ranks that share the sequences has some."""
        parts = [torch.empty_like(log_prob) for _ in range(self.dims.tp_size)]
        dist.all_gather(parts, log_prob, group=self.dims.mesh["tp"].get_group())
        return torch.cat(parts)[batch["learnt"]].tolist()

    def _own(self, found: Sequence[Completed], rank: int | None = None) -> range:
        """The share of this data-parallel rank, or of another: whole groups."""
        group, rank = self.options.group, self.dims.dp_rank if rank is None else rank
        part = replace(self.dims, dp_rank=rank).local_batch(len(found) // group)
        return range(part.start * group, part.stop * group)

    def _record(self, number: int, found: list[Completed]) -> None:
        lines = []
        for c in found:
            shown = {"rollout": number, "prompt": c.row, "completion": c.text, "reward": c.reward}
            lines.append(json.dumps(shown | ({"problem": c.problem} if c.problem else {}), ensure_ascii=False))
        try:
            with open(self.folder / COMPLETIONS, "a", encoding="utf-8", errors="replace") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            console.say("warning", f"can't write {self.folder / COMPLETIONS}: {error.strerror}; training continues")
        problems = [c.problem for c in found if c.problem]
        if problems:
            console.say("reward", f"none of {len(problems)} of {len(found)} completions: {problems[0]}")

    # ---- batches ----

    def _batches(self, found: list[Completed]) -> list[Batch]:
        """This rank's micro-batches of completions; equally many on all ranks.

        Completions whose gradient is 0, such as those of groups with equal rewards, are counted and not computed.
        """
        group, size = self.options.group, self.config.train.micro_batch
        groups = torch.arange(len(found)) // group
        gains = advantages(
            torch.from_numpy(rewards_of(found)), groups, scale=self.options.variant != "dr_grpo"
        ).tolist()
        teaches = [
            self.reference is not None or (gain != 0 and self._counts(c)) for c, gain in zip(found, gains, strict=True)
        ]
        shares = [[i for i in self._own(found, rank) if teaches[i]] for rank in range(self.dims.dp_size)]
        own, most = shares[self.dims.dp_rank], max(1, *map(len, shares))
        batches = [self._packed([(found[i], gains[i]) for i in own[k : k + size]]) for k in range(0, most, size)]
        counted = self._numbers([found[i] for i in self._own(found)])
        for batch, numbers in zip(batches, [counted, *[dict.fromkeys(counted, 0.0)] * (len(batches) - 1)], strict=True):
            batch |= {f"n_{name}": torch.tensor(float(x)) for name, x in numbers.items()}
        return batches

    def _counts(self, completed: Completed) -> bool:
        """Whether it is learnt from."""
        return completed.reward is not None and (self.options.train_truncated or not completed.truncated)

    def _numbers(self, found: Sequence[Completed]) -> dict[str, float]:
        """Sums over completions: what the loss is divided by, and what is logged."""
        counted = [c for c in found if self._counts(c)]
        known = [c.reward for c in found if c.reward is not None]
        by_token = self.options.variant == "dapo"
        return {
            "count": sum(len(c.tokens) for c in counted) if by_token else len(counted),
            "completions": len(found),
            "known": len(known),
            "reward": sum(known),
            "length": sum(len(c.tokens) for c in found),
            "truncated": sum(c.truncated for c in found),
        }

    def _packed(self, part: Sequence[tuple[Completed, float]]) -> Batch:
        """Completions behind their prompts, with what the loss needs of each token."""
        sequences, columns = [], []
        for c, gain in part:
            prompt, _ = self.sampler.prompts.sequence(c.row)
            ids = np.concatenate((prompt, np.array(c.tokens, np.int32)))
            sequences.append((ids, np.arange(len(ids)) >= len(prompt)))
            n = len(c.tokens)
            weight = {"grpo": 1 / n, "dr_grpo": 1 / self.options.max_tokens, "dapo": 1.0}[self.options.variant]
            old, reference = c.old or [0.0] * n, c.reference or [0.0] * n
            columns.append(
                np.array([[gain] * n, [weight * self._counts(c)] * n, old, reference, c.log_probs], np.float32)
            )
        batch = joined(sequences or [(np.zeros(2, np.int32), np.zeros(2, bool))], self.dims.tp_size)
        packed = np.zeros((len(COLUMNS), batch["targets"].numel()), np.float32)
        if columns:
            packed[:, (batch["targets"][0] != IGNORE_INDEX).numpy()] = np.concatenate(columns, 1)
        batch |= {name: torch.from_numpy(x)[None] for name, x in zip(COLUMNS, packed, strict=True)}
        batch = {
            name: x if name == "positions" else self.dims.shard_sequence(x) for name, x in places_of(batch).items()
        }
        return batch | {"cu_seqlens": cu_seqlens_of(batch["positions"])}

    # ---- the loss ----

    def _log_probs(self, model: nn.Module, batch: Batch, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of the learnt tokens: log-probability and entropy at the policy's temperature, log-probability at 1."""
        chosen, temperature = learnt(batch, self.dims), self.options.temperature
        targets = chosen(batch["targets"])

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows = chosen(hidden)
            if not entropy:
                log_prob = linear_log_prob(rows, weight, targets, temperature=temperature)
                return log_prob, log_prob, log_prob
            log_prob, spread = linear_log_prob(rows, weight, targets, temperature=temperature, return_entropy=True)
            with torch.no_grad():
                plain = log_prob if temperature == 1 else linear_log_prob(rows, weight, targets)
            return log_prob, spread.detach(), plain.detach()

        return model(batch["tokens"], positions=batch["positions"], cu_seqlens=batch["cu_seqlens"], head=head)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        log_prob, entropy, plain = self._log_probs(model, batch, entropy=True)
        chosen = learnt(batch, self.dims)
        gain, weight, old, reference, sampled = (chosen(batch[name]) for name in COLUMNS)
        if self.options.updates == 1:
            old = log_prob.detach()
        loss, clipped = policy_loss(log_prob, old, gain, self.options.clip_low, self.clip_high)
        is_token = chosen(batch["targets"]) != IGNORE_INDEX
        tokens = is_token.sum()
        metrics = {
            "entropy": entropy.sum(),
            "mismatch": ((plain - sampled).abs() * is_token).sum(),
            "clip_fraction": (clipped & is_token).sum(),
        }
        if self.reference is not None:
            distance = kl_estimate(log_prob, reference)
            loss = loss + self.options.kl * distance
            metrics["kl"] = (distance.detach() * is_token).sum()
        counts = dict.fromkeys(metrics, tokens)
        # What is not of a token is counted by one of the ranks that share the sequences.
        numbers = {name: batch[f"n_{name}"] * (self.dims.tp_rank == 0) for name in NUMBERS}
        metrics |= {name: numbers[name] for name in ("reward", "length", "truncated")}
        metrics["failed"] = numbers["completions"] - numbers["known"]
        counts |= dict.fromkeys(("length", "truncated", "failed"), numbers["completions"])
        counts["reward"] = numbers["known"]
        return Loss((loss * weight * is_token).sum(), numbers["count"], metrics, counts, tokens)


METRICS = ("reward", "entropy", "mismatch", "clip_fraction", "length", "truncated", "failed")
NUMBERS = ("count", "completions", "known", "reward", "length", "truncated")  # of a batch: see _numbers
COLUMNS = ("gain", "weight", "old", "reference", "sampled")  # of a batch, beside the targets


def _differ(group: Sequence[Completed]) -> bool:
    """Whether the group's rewards differ, so that it teaches something."""
    return len({c.reward for c in group if c.reward is not None}) > 1


class RewardEvaluator:
    """The mean reward of the most likely completions of held-out prompts; the loss is its negative."""

    def __init__(self, sampler: Sampler, rows: Sequence[int]) -> None:
        self.sampler, self.rows = sampler, rows

    def evaluate(self, model: nn.Module, dims: ParallelDims, device: torch.device) -> tuple[float, dict[str, float]]:
        found = self.sampler.sample(model, self.rows, [0] * len(self.rows), 1, 0.0)
        rewards = rewards_of(found)
        mean = float(np.nanmean(rewards)) if np.isfinite(rewards).any() else 0.0
        length = sum(len(c.tokens) for c in found) / len(found)
        return -mean, {"reward": mean, "length": length}


# ---- the method ----


class Grpo:
    """``fastllm align --method grpo``."""

    name = "align"
    panels = (
        Panel("reward", (("reward", "training", "-"), ("validation_reward", "validation", "o-"))),
        Panel("entropy (nats)", (("entropy", "entropy", "-"),)),
        Panel("tokens", (("length", "of a completion", "-"),)),
    )

    def prepare(self, config: RewardConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
        if not config.grpo.reward:
            raise UserError("grpo needs a reward: give --grpo.reward MODULE:FUNCTION")
        RewardPool(config.grpo.reward, 1, config.grpo.reward_seconds).close()  # it can be imported
        report, builder, lines = Report(), ExamplesBuilder(), []
        room = config.model.max_seq_len - config.grpo.max_tokens

        def encode(prompt: Prompt) -> list[Encoded]:
            assert tokenizer.chat_template is not None
            try:
                ids = tokenizer.chat_template.encode(tokenizer, prompt.messages, tools=prompt.tools)
            except UserError as error:
                raise Refused(FAILS, str(error)) from None
            if len(ids) > room:
                raise Refused(TOO_LONG, f"{len(ids):,} tokens, and {config.grpo.max_tokens} of an answer")
            return [Encoded(np.array(ids, np.int32), np.zeros(len(ids), bool))]

        for number, evaluated, path in sources(config.data):
            for prompt, part in encoded(read_prompts(path, report), report, encode):
                builder.add([part], number, evaluated=evaluated)
                lines.append(json.dumps({"messages": prompt.messages, "row": prompt.row}))
        examples = finish(builder, report, config.data, folder)
        write_atomic(folder / PROMPTS, "".join(f"{line}\n" for line in lines).encode())
        # Each prompt is read once in an epoch.
        return {"items": len(examples.split.train), "data": examples.checksum, "report": report.as_dict()}

    def task(self, context: Context) -> Task:
        config = context.config
        examples = Examples.load(context.folder / EXAMPLES, context.metadata["data"])
        lines = (context.folder / PROMPTS).read_bytes().splitlines()
        options = config.grpo
        pool = run_on_all_ranks(lambda: RewardPool(options.reward, options.reward_workers, options.reward_seconds))
        context.resources.enter_context(pool)
        sampler = Sampler(
            config, context.tokenizer, context.dims, context.precision, examples, [*map(json.loads, lines)], pool
        )
        train, validation = examples.split
        weights = weights_of(config.data)
        mixture = mixture_of(config, weights)
        data = PromptData(examples, train, seed=config.train.seed, weights=weights, mixture=mixture)
        objective = PolicyObjective(context, sampler, data, reference_of(context) if options.kl else None)
        held_out = validation[: options.eval_prompts].tolist()
        return Task(objective, data, RewardEvaluator(sampler, held_out) if held_out else None)

    def warnings(self, log: Path) -> list[str]:
        shares = [r["truncated"] for r in read_log(log) if isinstance(r.get("truncated"), float)]
        share = sum(shares) / max(1, len(shares))
        if share < MANY_TRUNCATED:
            return []
        cut = f"{share:.0%} of the completions were cut off by --grpo.max-tokens"
        return [f"{cut}: give more tokens; without --grpo.train-truncated they teach nothing"]


def reference_of(context: Context) -> nn.Module:
    """The model that training began with, sharded as the model is."""
    config = context.config
    model, _ = run_on_all_ranks(lambda: prepare_model(config, *load(config.base.path)))
    model.float().requires_grad_(False)
    parallelize(model, config.parallel, context.dims, context.precision)
    return model.to(context.device).eval()
