"""Preference optimization: DPO and its kin, on pairs of answers or on answers that are judged one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import console
from ..data.loader import IGNORE_INDEX, Batch, cu_seqlens_of
from ..data.permutation import key_of, permuted
from ..data.progress import progress
from ..data.tokenizer import Tokenizer
from ..distributed.mesh import ParallelDims, run_on_rank0
from ..distributed.parallelize import reshard
from ..errors import UserError
from ..kernels import linear_log_prob
from ..model.weights import save_weights
from ..training.evaluation import LossEvaluator
from ..training.metrics import read_log
from ..training.micro_batches import micro_batches, to_device
from ..training.objectives import Loss
from ..training.plot import Panel
from .config import PreferenceConfig
from .conversations import Judged, Pair, read_judged, read_pairs
from .datasets import encoded, finish, learnt, mixture_of, places_of, sources, weights_of
from .examples import Examples, ExamplesBuilder, joined, segment_sums
from .losses import Answers, Method, PreferenceOptions, kto_loss, needs_reference, pair_loss
from .rendering import CUT_ANSWER, Encoded, Refused, encode_chat
from .rows import Report
from .run import EXAMPLES, Context, Task, sequence_length

REFERENCE = "reference.safetensors"  # in a run folder: log-probabilities by the model that training began with
FALL = 0.05  # share by which the chosen answers' log-probability may fall without a warning


# ---- data ----


class AnswerData:
    """Rows of examples in an order that ``seed`` decides, each once an epoch; a row is the two answers of a pair, or
    one answer that is judged.

    Batches are packed: one row ``[1, tokens]`` of the items' sequences, whose "segments" count up through the items.
    With ``mismatched``, "kl_tokens" and so on hold, for each item, its prompt with the answer of another row.

    Args:
        examples, rows: the data, and which of it.
        reference: log-probabilities of answers by the reference model, ``[all rows, columns]``; None: there are none.
        weights: of the files; None: each row counts alike.
        ordered: the rows in their own order, each once.
    """

    def __init__(
        self,
        examples: Examples,
        rows: np.ndarray,
        *,
        seed: int = 0,
        reference: np.ndarray | None = None,
        mismatched: bool = False,
        weights: Any = None,
        mixture: Any = None,
        multiple: int = 1,
        ordered: bool = False,
    ) -> None:
        self.examples, self.rows, self.seed, self.reference = examples, rows, seed, reference
        self.mismatched, self.multiple, self.ordered = mismatched, multiple, ordered
        self.mixture = mixture
        self.groups = [rows] if mixture is None else [rows[examples.source[rows] == i] for i in range(len(weights))]
        self.weights = weights
        # Far away: the answers to one prompt are often side by side.
        self._other = dict(zip(rows.tolist(), np.roll(rows, len(rows) // 2).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self, index: int, n: int) -> list[int]:
        """The rows that are the items ``index`` to ``index + n``."""
        if self.ordered:
            return self.rows[index : index + n].tolist()
        items = np.arange(index, index + n)
        of, item = self.mixture.locate(items) if self.mixture else (np.zeros_like(items), items)
        numbers = []
        for source, k in zip(of.tolist(), item.tolist(), strict=True):
            group = self.groups[source]
            epoch, place = divmod(k, len(group))
            numbers.append(int(group[permuted(np.array([place]), len(group), key_of(self.seed, source, epoch))[0]]))
        return numbers

    def batch(self, index: int, n: int) -> Batch:
        numbers, examples, per_row = self.numbers(index, n), self.examples, self.examples.per_row
        sequences = [examples.sequence(row * per_row + side) for row in numbers for side in range(per_row)]
        batch = places_of(joined(sequences, self.multiple))
        batch["lengths"] = torch.tensor([int(trained.sum()) for _, trained in sequences])
        batch["valid"] = torch.ones(n)
        if "desirable" in examples.extra:
            batch["desirable"] = torch.from_numpy(examples.extra["desirable"][numbers])
        if self.reference is not None:
            # Of one dimension: the second is that of tokens, which ranks share.
            batch["reference"] = torch.from_numpy(self.reference[numbers]).flatten()
        if self.mismatched:
            swapped = [_swapped(examples.sequence(row), examples.sequence(self._other[row])) for row in numbers]
            other = places_of(joined(swapped, self.multiple))
            batch |= {f"kl_{name}": tensor for name, tensor in other.items()}
            batch["kl_cu_seqlens"] = cu_seqlens_of(other["positions"])
        return batch

    def padding(self) -> Batch:
        """An item that counts nothing."""
        batch = self.batch(0, 1)
        ignored = {
            name: torch.full_like(batch[name], IGNORE_INDEX) for name in ("targets", "kl_targets") if name in batch
        }
        return batch | ignored | {"valid": torch.zeros(1)}

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "examples": self.examples.checksum, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in self.state_dict().items():
            if state.get(key) != value:
                raise UserError(f"the checkpoint was trained on data of {key} {state.get(key)}, this is {key} {value}")


def _swapped(own: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The prompt of ``own`` with the answer of ``other``."""
    (ids, trained), (other_ids, other_trained) = own, other
    prompt, answer = int(trained.argmax()), int(other_trained.argmax())
    parts = ids[:prompt], other_ids[answer:]
    return np.concatenate(parts), np.concatenate((trained[:prompt], other_trained[answer:]))


# ---- objectives ----


def answer_log_probs(model: nn.Module, batch: Batch, dims: ParallelDims, count: int, prefix: str = "") -> Tensor:
    """``[count]``: the log-probability of each segment's targets, summed, in nats; the logits are never held."""
    own = {name.removeprefix(prefix): x for name, x in batch.items() if name.startswith(prefix)}
    chosen = learnt(own, dims)
    targets, segments = chosen(own["targets"]), chosen(own["segments"])
    log_prob = model(
        own["tokens"], positions=own["positions"], cu_seqlens=own["cu_seqlens"],
        head=lambda hidden, weight: linear_log_prob(chosen(hidden), weight, targets),
    )  # fmt: skip
    sums = segment_sums(log_prob, segments, count)
    if dims.tp_size > 1:  # each rank has the targets of its tokens; the gradient of a sum needs no exchange
        total = sums.detach().clone()
        dist.all_reduce(total, group=dims.mesh["tp"].get_group())
        sums = sums + (total - sums.detach())
    return sums


def once(dims: ParallelDims, loss: Loss) -> Loss:
    """``loss``, which the ranks that share a sequence all have, such that it is counted once."""
    if dims.tp_rank == 0:
        return loss
    zeros = {name: torch.zeros_like(x) for name, x in loss.metrics.items()}
    counts = {name: torch.zeros_like(x) for name, x in loss.counts.items()}
    tokens = None if loss.tokens is None else torch.zeros_like(loss.tokens)
    return Loss(loss.loss_sum - loss.loss_sum.detach(), torch.zeros_like(loss.count), zeros, counts, tokens)


class PairObjective:
    """The loss of pairs, by any method but KTO."""

    metric_names: tuple[str, ...] = (
        "chosen_reward", "rejected_reward", "margin", "accuracy", "chosen_log_prob", "rejected_log_prob",
    )  # fmt: skip

    def __init__(self, dims: ParallelDims, method: Method, options: PreferenceOptions) -> None:
        self.dims, self.method, self.options = dims, method, options

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        valid, lengths = batch["valid"], batch["lengths"].view(-1, 2)
        pairs = len(valid)
        log_prob = answer_log_probs(model, batch, self.dims, 2 * pairs).view(pairs, 2)
        reference = batch["reference"].view(pairs, 2).unbind(1) if "reference" in batch else (None, None)
        chosen, rejected = (Answers(log_prob[:, side], lengths[:, side], reference[side]) for side in (0, 1))
        found = pair_loss(self.method, chosen, rejected, self.options)
        margin = found.chosen_reward - found.rejected_reward
        values = (
            found.chosen_reward, found.rejected_reward, margin, (margin > 0).float(), *log_prob.detach().unbind(1)
        )  # fmt: skip
        metrics = {name: (x * valid).sum() for name, x in zip(self.metric_names, values, strict=True)}
        tokens = (lengths.sum(1) * valid).sum()
        return once(self.dims, Loss((found.loss * valid).sum(), valid.sum(), metrics, tokens=tokens))


class KtoObjective:
    """The loss of answers that are judged one by one.

    The divergence from the reference that KTO compares with is that of the whole step's answers to other prompts,
    whatever the micro-batches and ranks. An evaluation takes that of the latest step.
    """

    metric_names: tuple[str, ...] = ("chosen_reward", "rejected_reward", "chosen_log_prob", "kl")

    def __init__(self, dims: ParallelDims, options: PreferenceOptions, device: torch.device) -> None:
        self.dims, self.options = dims, options
        self.kl = torch.zeros((), device=device)

    @torch.no_grad()
    def begin_step(self, model: nn.Module, step: int, index: int, batches: list[Batch]) -> list[Batch]:
        sums = torch.zeros(2, device=self.kl.device)
        for batch in batches:
            valid = batch["valid"]
            log_prob = answer_log_probs(model, batch, self.dims, len(valid), "kl_")
            ratio = (log_prob - batch["reference"].view(-1, 2)[:, 1]) * valid
            sums += torch.stack((ratio.sum(), valid.sum()))
        dist.all_reduce(sums)
        self.kl = (sums[0] / sums[1].clamp(min=1)).clamp(min=0)
        return batches

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        valid, desirable = batch["valid"], batch["desirable"]
        log_prob = answer_log_probs(model, batch, self.dims, len(valid))
        found = kto_loss(log_prob, batch["reference"].view(-1, 2)[:, 0], desirable, self.kl, self.options)
        good, bad = valid * desirable, valid * ~desirable
        metrics = {
            "chosen_reward": (found.reward * good).sum(),
            "rejected_reward": (found.reward * bad).sum(),
            "chosen_log_prob": (log_prob.detach() * good).sum(),
            "kl": self.kl * valid.sum(),
        }
        counts = {"chosen_reward": good.sum(), "rejected_reward": bad.sum(), "chosen_log_prob": good.sum()}
        tokens = (batch["lengths"] * valid).sum()
        return once(self.dims, Loss((found.loss * valid).sum(), valid.sum(), metrics, counts, tokens))


# ---- the method ----


class Preferences:
    """``fastllm align --method dpo`` and its kin."""

    name = "align"
    panels = (
        Panel("accuracy", (("accuracy", "training", "-"), ("validation_accuracy", "validation", "o-"))),
        Panel("reward", (("chosen_reward", "chosen", "-"), ("rejected_reward", "rejected", "-"))),
        Panel("log-probability", (("chosen_log_prob", "chosen", "-"), ("rejected_log_prob", "rejected", "-"))),
    )

    def prepare(self, config: PreferenceConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
        method, report, max_tokens = method_of(config), Report(), sequence_length(config)
        config.preferences.check_method(method)
        builder = ExamplesBuilder(1 if method == "kto" else 2)
        desirable: list[bool] = []
        for number, evaluated, path in sources(config.data):
            rows: Iterator[Any] = read_judged(path, report) if method == "kto" else read_pairs(path, report)
            encode = encode_judged if method == "kto" else encode_pair
            for row, sides in encoded(rows, report, partial(_alone, encode, tokenizer, max_tokens)):
                builder.add(sides, number, evaluated=evaluated)
                if method == "kto":
                    desirable.append(row.desirable)
        extra = {"desirable": np.array(desirable)} if method == "kto" else {}
        if method == "kto" and len(set(desirable)) == 1:
            raise UserError("kto needs both desirable and undesirable answers: all rows have the same label")
        examples = finish(builder, report, config.data, folder, extra)
        return {"items": len(examples.split.train), "data": examples.checksum, "report": report.as_dict()}

    def task(self, context: Context) -> Task:
        config, dims = context.config, context.dims
        method = method_of(config)
        examples = Examples.load(context.folder / EXAMPLES, context.metadata["data"])
        train, validation = examples.split
        weights = weights_of(config.data)
        options: dict[str, Any] = {"mismatched": method == "kto", "multiple": dims.tp_size}
        if needs_reference(method):
            options["reference"] = reference_log_probs(context, examples, options)
        objective: PairObjective | KtoObjective
        if method == "kto":
            objective = KtoObjective(dims, config.preferences, context.device)
        else:
            objective = PairObjective(dims, method, config.preferences)
        mixture = mixture_of(config, weights)
        data = AnswerData(examples, train, seed=config.train.seed, weights=weights, mixture=mixture, **options)
        evaluator = None
        if len(validation):
            held_out = AnswerData(examples, validation, ordered=True, **options)
            evaluator = LossEvaluator(objective, held_out, len(held_out), config.train.micro_batch)
        return Task(objective, data, evaluator)

    def warnings(self, log: Path) -> list[str]:
        records = read_log(log)
        for name in ("validation_chosen_log_prob", "chosen_log_prob"):
            values = [r[name] for r in records if isinstance(r.get(name), float)]
            if len(values) > 1:
                break
        else:
            return []
        few = 1 if name.startswith("validation") else max(1, len(values) // 5)
        first, last = sum(values[:few]) / few, sum(values[-few:]) / few
        if last >= first - FALL * abs(first):
            return []
        return [
            f"the log-probability of the chosen answers fell from {first:.1f} to {last:.1f} nats: the loss asks for a "
            "margin over the rejected ones, not for likely answers, and lowered both. A lower --optim.lr, a higher "
            "--preferences.beta, or a method with a cross-entropy term (cpo, orpo) prevents it"
        ]


def method_of(config: PreferenceConfig) -> Method:
    method: Any = config.base.method
    return method


def _alone(encode: Any, tokenizer: Tokenizer, max_tokens: int, row: Any) -> list[list[Encoded]]:
    return [encode(tokenizer, row, max_tokens)]


def encode_pair(tokenizer: Tokenizer, pair: Pair, max_tokens: int) -> list[Encoded]:
    """Both sides of a pair, each a whole chat. Raises Refused where one can't be trained on or they are equal."""
    found = [_answer(tokenizer, pair.prompt, side, pair.tools, max_tokens) for side in (pair.chosen, pair.rejected)]
    if np.array_equal(found[0].ids, found[1].ids):
        raise Refused(EQUAL)
    return found


EQUAL = "both sides are the same tokens"
APART = "the chat template writes an answer otherwise once another follows"


def encode_judged(tokenizer: Tokenizer, row: Judged, max_tokens: int) -> list[Encoded]:
    return [_answer(tokenizer, row.prompt, row.answer, row.tools, max_tokens)]


def _answer(tokenizer: Tokenizer, prompt: Sequence[Any], answer: Sequence[Any], tools: Any, max_tokens: int) -> Encoded:
    """A prompt with an answer, which is learnt; all of it fits into ``max_tokens``."""
    found = encode_chat(tokenizer, [*prompt, *answer], tools, max_tokens=max_tokens, first=len(prompt))
    if found[-1].cut:
        raise Refused(CUT_ANSWER, f"{max_tokens:,} tokens")
    if len(found) > 1:
        raise Refused(APART)
    return found[0]


# ---- the reference ----


@torch.no_grad()
def reference_log_probs(context: Context, examples: Examples, options: Mapping[str, Any]) -> np.ndarray:
    """Log-probabilities of all rows' answers by the model as it is now, before its first step, float32 ``[rows, 2]``:
    of both sides of a pair, or of an answer and of another row's answer to its prompt.

    They are computed once, and kept in the run folder.
    """
    path, model, dims, device = context.folder / REFERENCE, context.model, context.dims, context.device
    identity = {"examples": examples.checksum, "base": context.metadata["base_weights"]}
    if (known := run_on_rank0(lambda: read_reference(path, identity))) is not None:
        return known
    console.say("reference", f"log-probabilities of {len(examples):,} rows by the model that training begins with")
    total = torch.zeros(len(examples), 2, dtype=torch.float64)
    model.eval()
    for part in examples.split:
        data = AnswerData(examples, part, ordered=True, **{**options, "reference": None})
        size = context.config.train.micro_batch
        own = [part[i] for i in dims.local_batch(len(part))]
        batches = micro_batches(data, 0, len(part), size, dims)
        with progress("reference", len(own)) as bar:
            for first, batch in zip(itertools.count(0, size), batches, strict=False):
                batch, numbers = to_device(batch, device), own[first : first + size]
                count = len(batch["valid"])
                sums = answer_log_probs(model, batch, dims, count * examples.per_row).view(count, -1)
                if examples.per_row == 1:
                    sums = torch.stack((sums[:, 0], answer_log_probs(model, batch, dims, count, "kl_")), 1)
                if dims.tp_rank == 0:
                    total[numbers] = sums[: len(numbers)].double().cpu()
                bar.advance(len(numbers))
    model.train()
    reshard(model)
    dist.all_reduce(total)
    found = total.float().numpy()
    run_on_rank0(lambda: save_weights(path, {"log_probs": torch.from_numpy(found)}, identity))
    return found


def read_reference(path: Path, identity: Mapping[str, str]) -> np.ndarray | None:
    """What :func:`reference_log_probs` wrote for the same examples and weights; None where there is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            same = all(metadata.get(key) == value for key, value in identity.items())
            return file.get_tensor("log_probs") if same else None
    except (OSError, SafetensorError):
        return None
