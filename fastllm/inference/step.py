"""The rows of a step: which tokens the model computes, and where their keys lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .paged_gpt import DecodeRows, PromptRows, Rows
from .request import Request


@dataclass(frozen=True)
class Step:
    """The rows, whose wanted ones belong to ``answering`` in turn, and how far each prompt is computed after them."""

    rows: Rows
    answering: list[Request]
    prompt_parts: list[tuple[Request, int]]


def rows_of(
    running: Sequence[Request],
    proposals: Mapping[Request, list[int]],
    chunk: int,
    page_size: int,
    device: torch.device,
) -> Step:
    """The latest token of each answer and what is proposed after it, then up to ``chunk`` tokens of prompts."""
    decoding = [request for request in running if request.tokens]
    decoding.sort(key=lambda request: len(proposals.get(request, ())))  # those with equally many rows stand together
    parts = [(request, request.length - 1, [request.tokens[-1], *proposals.get(request, ())]) for request in decoding]
    groups: dict[int, list[Request]] = {}
    for request, _, tokens in parts:
        groups.setdefault(len(tokens), []).append(request)
    decode, first = [], 0
    for queries, group in groups.items():
        decode.append(decode_rows(first, queries, [(r, r.length - 1 + queries) for r in group], device))
        first += queries * len(group)
    answering, wanted = [*decoding], list(range(first))
    prompt_parts: list[tuple[Request, int]] = []
    left = chunk
    for request in running:
        if not request.tokens and left:
            tokens = request.prompt[request.computed : request.computed + left]
            parts.append((request, request.computed, tokens))
            prompt_parts.append((request, request.computed + len(tokens)))
            left -= len(tokens)
    prompts = None
    if prompt_parts:
        prompts = prompt_rows(first, parts[len(decoding) :], page_size, device)
        last = first - 1
        for (request, computed), (_, _, tokens) in zip(prompt_parts, parts[len(decoding) :], strict=True):
            last += len(tokens)
            if computed == len(request.prompt):
                wanted.append(last)
                answering.append(request)
    return Step(rows(parts, wanted, decode, prompts, page_size, device), answering, prompt_parts)


Part = tuple[Request, int, list[int]]  # a request, a place in it, and the tokens from there


def rows(
    parts: Sequence[Part],
    wanted: Sequence[int],
    decode: list[DecodeRows],
    prompts: PromptRows | None,
    page_size: int,
    device: torch.device,
) -> Rows:
    tokens = torch.tensor([token for _, _, tokens in parts for token in tokens])
    rows_wanted = torch.tensor(wanted, dtype=torch.int64)
    positions = torch.cat([torch.arange(start, start + len(tokens)) for _, start, tokens in parts])
    slots = torch.cat([slots_of(request, start, start + len(tokens), page_size) for request, start, tokens in parts])
    return Rows(tokens.to(device), positions.to(device), slots.to(device), rows_wanted.to(device), decode, prompts)


def prompt_rows(first: int, parts: Sequence[Part], page_size: int, device: torch.device) -> PromptRows:
    """Rows from ``first`` on: the tokens of ``parts``, each of which sees its request up to itself."""
    queries = [len(tokens) for _, _, tokens in parts]
    keys = [start + len(tokens) for _, start, tokens in parts]
    cu_queries, cu_keys = (torch.tensor([0, *accumulate(n)], dtype=torch.int32).to(device) for n in (queries, keys))
    slots = [slots_of(request, 0, size, page_size) for (request, _, _), size in zip(parts, keys, strict=True)]
    return PromptRows(first, cu_queries, cu_keys, torch.cat(slots).to(device), max(queries), max(keys))


def slots_of(request: Request, start: int, end: int, page_size: int) -> Tensor:
    """Where the tokens of a request from ``start`` to ``end`` lie in the pool, int64."""
    assert request.table is not None
    places = torch.arange(start, end)
    return request.table[places // page_size].to(torch.int64) * page_size + places % page_size


def decode_rows(first: int, queries: int, group: Sequence[tuple[Request, int]], device: torch.device) -> DecodeRows:
    """Rows from ``first`` on: so many of each request, up to the length that is given with it."""
    tables = [request.table for request, _ in group if request.table is not None]
    table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
    lengths = torch.tensor([length for _, length in group])
    return DecodeRows(first, queries, table.to(device), lengths.to(device))
