"""Decode steps that are recorded once for each size of a batch, and replayed: without Python between their kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..kernels import native
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
        self.rows = Rows(zeros(size), zeros(size), zeros(size), None, [self.part])

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


class ReplayedGPT:
    """A :class:`PagedGPT` whose steps of one token for each sequence are replayed: on a GPU as CUDA graphs, on a CPU as
    the list of the native kernels' calls.

    A step is recorded when its size first comes. Others, with prompts or proposals, run as they are.
    """

    def __init__(self, model: PagedGPT, max_seq_len: int) -> None:
        self.paged, self._pages = model, -(-max_seq_len // model.keys.shape[2])
        self._recorded: dict[int, tuple[StaticRows, Callable[[], Tensor]]] = {}
        self.config, self.device, self.replays = model.config, model.device, 0

    @torch.inference_mode()
    def __call__(self, rows: Rows) -> Tensor:
        decoding = len(rows.decode) == 1 and rows.prompts is None and rows.decode[0].queries == 1
        size = next((size for size in SIZES if size >= len(rows.tokens)), None) if decoding else None
        if size is None:
            return self.paged(rows)
        if size not in self._recorded:
            static = StaticRows(size, self._pages, self.device)
            static.fill(rows)
            self._recorded[size] = static, (self._graph if self.device.type == "cuda" else self._calls)(static.rows)
        static, replay = self._recorded[size]
        static.fill(rows)
        return replay()[: len(rows.tokens)]

    def _graph(self, rows: Rows) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and tunes what is not yet
                self.paged(rows)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.paged(rows)

        def replay() -> Tensor:
            self.replays += 1
            graph.replay()
            return logits

        return replay

    def _calls(self, rows: Rows) -> Callable[[], Tensor]:
        model, recording = self.paged, native.recording()
        if recording is None:
            return lambda: model(rows)
        x = embedding(rows.tokens, model.embedding)
        with recording:
            logits = model.forward(x, rows)
        if len(recording) != model.launches:  # another backend, or PyTorch, computes a part
            return lambda: model(rows)

        def replay() -> Tensor:
            self.replays += 1
            torch.index_select(model.embedding, 0, rows.tokens, out=x)
            recording.replay()
            return logits

        return replay
