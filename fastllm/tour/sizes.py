"""How large the tour is: in full, or quick for a look at the machinery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import Config, ModelConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Size:
    """The amounts of everything.

    Attributes:
        things: of each kind in the world.
        rounds: how often all things are told anew, in each of the sources but the encyclopedia.
        machine_characters: of the texts that the machine has, at most.
        pretraining: the settings of ``fastllm train``.
        sft_epochs, align_epochs: of tuning.
    """

    things: Mapping[str, int]
    rounds: int
    machine_characters: int
    pretraining: Config
    sft_epochs: int
    align_epochs: int


FULL = Size(
    things={"person": 100, "town": 50, "animal": 50},
    rounds=5,
    machine_characters=80_000,
    pretraining=Config(
        model=ModelConfig(vocab_size=2048, dim=192, layers=4, heads=3, ffn_dim=512),
        optim=OptimConfig(optimizer="muon", lr=2e-2),
        train=TrainConfig(steps=1000, global_batch_tokens=4096, micro_batch=16),
    ),
    sft_epochs=8,
    align_epochs=2,
)
QUICK = Size(
    things={"person": 24, "town": 12, "animal": 12},
    rounds=2,
    machine_characters=20_000,
    pretraining=Config(
        model=ModelConfig(vocab_size=1024, dim=128, layers=2, heads=2, ffn_dim=352),
        optim=OptimConfig(optimizer="muon", lr=2e-2),
        train=TrainConfig(steps=300, global_batch_tokens=2048, micro_batch=8),
    ),
    sft_epochs=6,
    align_epochs=1,
)
