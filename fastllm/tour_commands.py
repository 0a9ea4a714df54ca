"""The command that shows the whole way from raw text to a chatbot: ``fastllm tour``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import arguments
from .errors import UserError


@dataclass(frozen=True)
class TourArguments:
    """Build a language model on this machine, offline, in about ten minutes on two cores.

    Raw sources in true formats (a crawl, an encyclopedia's dump, books, text) tell of an invented world. From them
    come a corpus, a tokenizer, a model that knows the world, a chatbot that answers, and one that also refuses what it
    must. Each step is a public command, printed so that it can be copied; report.md has what went in and what came out.
    A tour that was interrupted continues after its last finished step.
    """

    out: Path = Path("tour")  # the folder, new or of the same tour
    quick: bool = False  # two minutes, to see the machinery: the model learns little
    seed: int = 0  # of the world and of all that is drawn

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, it is {self.seed}")


ARGUMENTS: dict[str, type] = {"tour": TourArguments}


def tour(argv: list[str]) -> int:
    chosen = arguments.parse(TourArguments, "fastllm tour", argv)

    from .tour.run import tour

    return tour(chosen.out, quick=chosen.quick, seed=chosen.seed)
