"""The data of a run: from folders of tokens and the configuration to what the trainer reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import console
from ..config import Config
from ..data.loader import IGNORE_INDEX, EvaluationData, Sequences, TrainingData, unigram_loss
from ..data.mixture import Mixture, parse_weights
from ..data.packing import BestFit, Concatenated, Packing
from ..data.token_data import Documents, TokenData, is_token_folder, split
from ..errors import UserError
from ..run_dir import TOKENS

UNIGRAM_TOKENS = 2**21  # that token frequencies are counted in


class RunData(NamedTuple):
    """What a run is trained and evaluated on."""

    tokens: TokenData
    train: TrainingData
    validation: EvaluationData
    train_tokens: int
    validation_tokens: int


def token_paths(config: Config) -> list[Path]:
    """The folders of tokens that ``data.paths`` names; none where it names files to make tokens of."""
    named = [Path(path) for path in config.data.paths]
    found = [path for path in named if is_token_folder(path)]
    if found and len(found) < len(named):
        other = next(path for path in named if path not in found)
        raise UserError(f"{found[0]} is a folder of tokens and {other} is not: tokenize it too, or leave it out")
    return found


def open_tokens(config: Config, folder: Path) -> TokenData:
    """The tokens of the run in ``folder``: those in it, or where there are none those that its data names."""
    if is_token_folder(folder / TOKENS):
        return TokenData([folder / TOKENS])
    if (folder / "data").is_dir():
        raise UserError(
            f"{folder} has its tokens in data/*.npy, as an earlier version of fastllm wrote them: train anew"
        )
    paths = token_paths(config)
    if not paths:
        named = ", ".join(config.data.paths) or "the data"
        raise UserError(f"{folder} has no folder {TOKENS}, and {named} is no folder of tokens")
    return TokenData(paths)


def load_run_data(config: Config, tokens: TokenData) -> RunData:
    """Split and pack the documents. Raises UserError where there are too few, or the weights don't fit the sources."""
    seq_len, seed, data = config.model.max_seq_len, config.train.seed, config.data
    parts = split(tokens, data.validation, seq_len)
    tokens.forget_documents()
    sizes = {"training": parts.train.tokens, "validation": parts.validation.tokens}
    for purpose, n in sizes.items():
        if n < seq_len:
            raise UserError(
                f"too little data: {n} tokens for {purpose}, at least {seq_len} are needed; give more text or lower "
                "--model.max-seq-len"
            )

    def sequences(documents: Documents) -> Sequences:
        method: type[BestFit] | type[Concatenated] = BestFit if data.packing == "best-fit" else Concatenated
        packing: Packing = method(documents.lengths, seq_len, seed)
        return Sequences(tokens, documents, packing, seq_len)

    identity: dict[str, Any] = {"tokens": tokens.checksum, "validation": data.validation, "packing": data.packing}
    if named := data.weights or tokens.weights:
        weights, mixture = _mixture(config, named, tokens.sources, identity)
        sources = []
        for number, name in enumerate(tokens.sources):
            own = parts.train.select(parts.train_source == number)
            if weights[number] and not own.tokens:
                raise UserError(f"data.weights: all documents of {name!r} are in the validation split")
            sources.append(sequences(own if own.tokens else parts.train))  # one that is left out needs no own
        train = TrainingData(sources, seed, mixture, identity)
    else:
        train = TrainingData([sequences(parts.train)], seed, None, identity)
    packed = Sequences(tokens, parts.validation, BestFit(parts.validation.lengths, seq_len, 0), seq_len)
    return RunData(tokens, train, EvaluationData(packed, config.train.eval_tokens), *sizes.values())


def _mixture(
    config: Config, weights: tuple[str, ...], sources: list[str], identity: dict[str, Any]
) -> tuple[list[float], Mixture]:
    """The mixture of the sources, and the largest weight of each at any time. Adds what a checkpoint knows it by."""
    data, items = config.data, config.train.steps * config.sequences
    begin = parse_weights("data.weights", weights, sources)
    identity |= {"sources": sources, "weights": begin}
    if not data.anneal_weights:
        return begin, Mixture(begin, config.train.seed)
    end = parse_weights("data.anneal_weights", data.anneal_weights, sources)
    identity |= {"anneal_weights": end, "anneal_from": data.anneal_from, "schedule": items}
    mixture = Mixture(begin, config.train.seed, end, data.anneal_from, items)
    return [max(pair) for pair in zip(begin, end, strict=True)], mixture


def say_data(config: Config, data: RunData) -> None:
    """What the run reads, for the person who starts it."""
    sizes = f"{data.train_tokens:,} for training, {data.validation_tokens:,} for validation"
    console.say("tokenizer", f"{data.tokens.vocab_size:,} tokens; {sizes}")
    sequences = [source.packing.sequences for source in data.train.sources]
    if data.train.mixture is None:
        share = 1 - data.train_tokens / (sequences[0] * config.model.max_seq_len)
        console.say("packing", f"{config.data.packing}: {sequences[0]:,} sequences, {share:.2%} padding")
        return
    items = config.train.steps * config.sequences
    for name, n, wanted in zip(data.tokens.sources, sequences, data.train.mixture.expected(items), strict=True):
        console.say("source", f"{name}: {wanted / items:.1%} of the run, {wanted / n:.3g} times over")


def baseline(data: RunData) -> dict[str, float]:
    """Figures to compare the validation loss with: a unigram model's (nats per token), and the bytes per token."""
    targets = data.validation.batch(0, len(data.validation))["targets"].numpy()
    targets = targets[targets != IGNORE_INDEX]
    seq_len = data.train.sources[0].seq_len
    items = -(-min(data.train_tokens, UNIGRAM_TOKENS) // seq_len)
    counts = np.zeros(data.tokens.vocab_size, np.int64)
    for first in range(0, items, 256):
        seen = data.train.batch(first, min(256, items - first))["targets"].numpy()
        if max(seen.max(initial=0), targets.max(initial=0)) >= len(counts):
            data.tokens.verify(0, 1)  # which names the shard that is damaged
        counts += np.bincount(seen[seen != IGNORE_INDEX], minlength=len(counts))
    return {
        "unigram_loss": unigram_loss(counts, targets),
        "bytes_per_token": float(data.tokens.tokenizer.byte_lengths()[targets].mean()),
    }
