"""How a token is chosen from logits: parameters, penalties, truncation, and reproducible random numbers.

A row is treated alike whatever other rows are in the batch: its own parameters, its own random numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ParameterError
from ..input_files import shown
from ..kernels import cross_entropy, softmax
from .structured import Grammar

MOST_LOGPROBS = 100  # alternatives that a request may ask for
FEW = 256  # tokens that compete one by one with the rest as a whole, where there is no limit
NUCLEUS = 1024  # tokens that are sorted first, where top_p is the only limit


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. ParameterError names a field that has no meaning.

    The order of the steps: logit_bias, penalties, temperature, top_k, top_p, min_p, as in vLLM and transformers.
    """

    max_tokens: int | None = None  # new tokens at most; None: to the end of the context
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # choose among this many most likely tokens; 0: all
    top_p: float = 1.0  # choose among the most likely tokens that reach this probability together
    min_p: float = 0.0  # leave out tokens less likely than this share of the most likely one's probability
    repetition_penalty: float = 1.0  # of tokens in prompt and answer: divides logits above 0, multiplies those below
    frequency_penalty: float = 0.0  # subtracted from a logit for each time that its token was generated
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens that were generated
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> what is added to its logit
    seed: int | None = None  # the same seed gives the same tokens; None: a new one for each request
    stop: tuple[str, ...] = ()  # texts before which the answer ends; they are not part of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that end the answer, beside the model's own
    ignore_eos: bool = False  # generate max_tokens, whatever the model says
    logprobs: int | None = None  # also return so many of the most likely tokens at each place (None: the chosen alone)
    n: int = 1  # answers to each prompt
    grammar: Grammar | None = None  # the form of the answer: see json_schema and regex

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        most = self.max_tokens
        _check(most is None or (_whole(most) and most >= 1), self, "max_tokens", "a whole number from 1")
        _number(self, "temperature", 0, math.inf)
        _check(_whole(self.top_k) and self.top_k >= 0, self, "top_k", "a whole number from 0")
        _number(self, "top_p", 0, 1)
        _check(self.top_p > 0, self, "top_p", "above 0")
        _number(self, "min_p", 0, 1)
        _number(self, "repetition_penalty", 0, 1e6)
        _check(self.repetition_penalty > 0, self, "repetition_penalty", "above 0")
        _number(self, "frequency_penalty", -1e6, 1e6)
        _number(self, "presence_penalty", -1e6, 1e6)
        _check(self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2**64), self, "seed", "from 0 to 2**64 - 1")
        _check(all(isinstance(s, str) and s for s in self.stop), self, "stop", "texts that are not empty")
        _check(all(map(_whole, self.stop_token_ids)), self, "stop_token_ids", "token ids")
        limits = self.logprobs is None or (_whole(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS)
        _check(limits, self, "logprobs", f"from 0 to {MOST_LOGPROBS}")
        _check(_whole(self.n) and 1 <= self.n <= 1024, self, "n", "from 1 to 1024")
        for token, bias in self.logit_bias.items():
            fine = _whole(token) and isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= 1e4
            _check(fine, self, "logit_bias", "token ids with numbers from -10,000 to 10,000")


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _check(fine: bool, params: SamplingParams, name: str, what: str) -> None:
    if not fine:
        raise ParameterError(name, f"{name} must be {what}, it is {shown(getattr(params, name))}")


def _number(params: SamplingParams, name: str, low: float, high: float) -> None:
    x = getattr(params, name)
    fine = isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high
    _check(fine, params, name, f"a number from {low} to {high}" if high < math.inf else f"a number from {low}")


class Row(Protocol):
    """What sampling asks of the request that a row of logits belongs to."""

    params: SamplingParams
    key: int  # of its random numbers
    prompt: list[int]
    tokens: list[int]

    def allowed(self, vocab_size: int) -> Tensor | None:
        """bool ``[vocab_size]``: the tokens that may come next; None: all."""
        ...


@dataclass(frozen=True)
class Sampled:
    """A token, its log-probability, and the most likely tokens with theirs where they are asked for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled | None]:
    """The next token of each row of ``logits`` ``[rows, vocab_size]``, float32; None where they are not finite.

    Log-probabilities are those of the model: of the logits as they are, before any parameter. The random numbers are
    a function of the request's key, the token's place in the answer and the token: a row's choice depends neither on
    the other rows nor on how many tokens a step verifies.
    """
    low, high = torch.aminmax(logits, dim=-1)
    changed = _biased(logits, rows)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    groups: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_kind(row.params), []).append(i)
    for (kind, count), indices in groups.items():
        group = changed if len(indices) == len(rows) else changed[indices]
        greedy = kind == "greedy"
        chosen = group.argmax(-1) if greedy else _choose(group, [rows[i] for i in indices], kind, count)
        tokens[torch.tensor(indices, device=logits.device)] = chosen
    # A row of cross_entropy is summed in one order; torch.logsumexp splits few rows over threads.
    logprobs = -cross_entropy(logits, tokens, reduction="none")
    found = torch.stack([tokens.double(), logprobs.double(), (low.isfinite() & high.isfinite()).double()])
    tops = _top_logprobs(logits, rows)
    return [
        Sampled(int(token), logprob, top) if finite else None
        for token, logprob, finite, top in zip(*found.tolist(), tops, strict=True)  # on a GPU the one wait
    ]


def _kind(params: SamplingParams) -> tuple[str, int]:
    """Rows of a kind are sampled together; what a row gets depends on its kind alone."""
    if params.temperature == 0:
        return "greedy", 0
    if params.top_k:
        return "top_k", params.top_k
    return ("top_p", NUCLEUS) if params.top_p < 1 else ("all", 0)


def _biased(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The logits after biases, penalties and masks: a copy where a row has any."""
    changed = logits
    for i, row in enumerate(rows):
        p = row.params
        allowed = row.allowed(logits.shape[-1])
        penalised = p.repetition_penalty != 1 or p.frequency_penalty or p.presence_penalty
        if not (p.logit_bias or penalised or allowed is not None):
            continue
        if changed is logits:
            changed = logits.clone()
        x = changed[i]
        if p.logit_bias:
            x[_ids(p.logit_bias, x)] += torch.tensor([*p.logit_bias.values()], dtype=x.dtype, device=x.device)
        if p.repetition_penalty != 1:
            seen = _ids({*row.prompt, *row.tokens}, x)
            x[seen] = torch.where(x[seen] > 0, x[seen] / p.repetition_penalty, x[seen] * p.repetition_penalty)
        if row.tokens and (p.frequency_penalty or p.presence_penalty):
            counts = Counter(row.tokens)
            times = torch.tensor([*counts.values()], dtype=x.dtype, device=x.device)
            x[_ids(counts, x)] -= times * p.frequency_penalty + p.presence_penalty
        if allowed is not None:
            x.masked_fill_(~allowed.to(x.device), float("-inf"))
    return changed


def _ids(tokens: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor([*tokens], dtype=torch.int64, device=like.device)


def _choose(logits: Tensor, rows: list[Row], kind: str, count: int) -> Tensor:
    """A token of each row, by the Gumbel-max trick: the largest of logits plus noise (Gumbel 1954).

    ``count``: the most likely tokens that a row is sorted to; the kind "top_p" may need more.
    """

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor([*values], dtype=torch.float32, device=logits.device)[:, None]

    # beyond these limits float32 would make the temperature 0 or infinite
    temperatures = column(min(max(row.params.temperature, 1e-30), 1e30) for row in rows)
    x = (logits - logits.amax(-1, keepdim=True)) / temperatures
    lowest = None
    if any(row.params.min_p for row in rows):
        lowest = column(math.log(row.params.min_p) if row.params.min_p else -math.inf for row in rows)
    if kind == "all":
        return _compete(x if lowest is None else x.masked_fill(x < lowest, float("-inf")), rows)
    vocab_size = x.shape[-1]
    whole = kind == "top_p" and logits.is_cuda  # whether fewer are enough is only known after a wait
    count = vocab_size if whole else min(count, vocab_size)
    probs = softmax(x) if kind == "top_p" else None
    x, ids = x.topk(count) if count < vocab_size else x.sort(dim=-1, descending=True, stable=True)
    probs = softmax(x) if probs is None else probs.gather(-1, ids)
    before, top_p = probs.cumsum(-1) - probs, column(row.params.top_p for row in rows)
    if kind == "top_p" and count < vocab_size and (flat := before[:, -1] + probs[:, -1] < top_p[:, 0]).any():
        parts = [[i] for i, more in enumerate(flat.tolist()) if more]
        rest = [i for i, more in enumerate(flat.tolist()) if not more]
        chosen = torch.empty(len(rows), dtype=torch.int64, device=x.device)
        for part in [*parts, *([rest] if rest else [])]:
            size = count if part is rest else 8 * count
            chosen[part] = _choose(logits[part], [rows[i] for i in part], kind, size)
        return chosen
    left_out = before >= top_p if lowest is None else (before >= top_p) | (x < lowest)
    x = x.masked_fill(left_out, float("-inf"))  # the most likely one always stays
    return ids.gather(-1, (x + _noise(rows, ids)).argmax(-1, keepdim=True))[:, 0]


def _compete(x: Tensor, rows: Sequence[Row]) -> Tensor:
    """A token of each row, among all.

    Noise for each token of a large vocabulary takes longer than a small model's step. So the FEW most likely ones
    compete with the rest as a whole, a token more, whose probability is their sum. Only where it wins, the tokens of
    the rest compete. The probabilities are the same (Maddison et al. 2014, A* sampling).
    """
    vocab_size = x.shape[-1]
    if x.is_cuda or vocab_size <= 4 * FEW:  # on a GPU noise is cheap, and to know the winner a wait
        return _likeliest(x, rows)
    few, ids = x.topk(FEW)
    others = x.scatter(-1, ids, float("-inf"))
    _, rest = cross_entropy(others, ids[:, 0], reduction="none", return_lse=True)
    noise = _noise(rows, torch.cat([ids, torch.full_like(ids[:, :1], vocab_size)], -1))
    chosen = (torch.cat([few, rest[:, None]], -1) + noise).argmax(-1, keepdim=True)
    tokens = ids.gather(-1, chosen.clamp(max=FEW - 1))[:, 0]
    if late := (chosen[:, 0] == FEW).nonzero()[:, 0].tolist():
        tokens[late] = _likeliest(others[late], [rows[i] for i in late])
    return tokens


def _likeliest(x: Tensor, rows: Sequence[Row]) -> Tensor:
    """The token of each row that is the likeliest with its noise."""
    return (x + _noise(rows, torch.arange(x.shape[-1], device=x.device))).argmax(-1)


def _noise(rows: Sequence[Row], tokens: Tensor) -> Tensor:
    keys = torch.tensor([_signed(row.key) for row in rows], device=tokens.device)[:, None]
    places = torch.tensor([len(row.tokens) for row in rows], device=tokens.device)[:, None]
    return gumbel(keys, places, tokens)


def gumbel(keys: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise, float64: a hash of a request's key, a place in its answer and a token, int64 that broadcast.

    Counters in place of a generator's state (Salmon et al. 2011): the noise of a token is the same wherever and
    whenever it is asked for. The hash is SplitMix64 (Steele et al. 2014), once for each of the three.
    """
    bits = _mix(tokens + _mix(places + _mix(keys)))
    uniform = (((bits >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step on int64, whose products wrap around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(x: int) -> int:
    """A number of 64 bits as int64."""
    return x - 2**64 if x >= 2**63 else x


def _top_logprobs(logits: Tensor, rows: Sequence[Row]) -> list[tuple[tuple[int, float], ...]]:
    tops: list[tuple[tuple[int, float], ...]] = []
    for x, row in zip(logits, rows, strict=True):
        count = row.params.logprobs or 0
        if not count:
            tops.append(())
            continue
        tokens = x.topk(min(count, len(x))).indices
        logprobs = -cross_entropy(x.expand(len(tokens), -1), tokens, reduction="none")
        tops.append(tuple(zip(tokens.tolist(), logprobs.tolist(), strict=True)))
    return tops
