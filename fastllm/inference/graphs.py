"""CUDA graphs of decode steps: the launches of a step, recorded once for each size of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .paged_gpt import DecodeRows, PagedGPT, Rows

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sequences of a batch; a step takes the next larger one


class StaticRows:
    """The rows of a decode step in memory of their own, for up to ``size`` sequences of one token each.

    What is left over are rows of no sequence: they see no key, and theirs are not written.
    """

    def __init__(self, size: int, pages: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.part = DecodeRows(0, 1, zeros(size, pages, dtype=torch.int32), zeros(size))
        self.rows = Rows(zeros(size), zeros(size), zeros(size), torch.arange(size, device=device), [self.part])

    def fill(self, rows: Rows) -> None:
        (part,) = rows.decode
        count, pages = part.block_table.shape
        for mine, theirs in ((self.rows.tokens, rows.tokens), (self.rows.positions, rows.positions)):
            mine[:count] = theirs
        self.rows.slots.fill_(-1)
        self.rows.slots[:count] = rows.slots
        self.part.lengths.zero_()
        self.part.lengths[:count] = part.lengths
        self.part.block_table[:count, :pages] = part.block_table


class GraphedGPT:
    """A :class:`PagedGPT` on a GPU whose steps of one token for each sequence are replayed from graphs.

    A graph is recorded when a size first comes. Other steps, with prompts or proposals, run as they are.
    """

    def __init__(self, model: PagedGPT, max_seq_len: int) -> None:
        self._model, self._pages = model, -(-max_seq_len // model.keys.shape[2])
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, StaticRows, Tensor]] = {}
        self.config, self.device = model.config, model.device

    def __call__(self, rows: Rows) -> Tensor:
        decoding = len(rows.decode) == 1 and rows.prompts is None and rows.decode[0].queries == 1
        size = next((size for size in SIZES if size >= len(rows.tokens)), None) if decoding else None
        if size is None:
            return self._model(rows)
        if size not in self._recorded:
            self._recorded[size] = self._record(size, rows)
        graph, static, logits = self._recorded[size]
        static.fill(rows)
        graph.replay()
        return logits[: len(rows.tokens)]

    def _record(self, size: int, rows: Rows) -> tuple[torch.cuda.CUDAGraph, StaticRows, Tensor]:
        static = StaticRows(size, self._pages, self.device)
        static.fill(rows)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and tunes what is not yet
                self._model(static.rows)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._model(static.rows)
        return graph, static, logits
