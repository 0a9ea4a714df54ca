"""Inference: an engine for many requests at once, and what is around it."""

from .engine import Engine, EngineStats
from .request import Completion, Delta, Prompt
from .sampling import SamplingParams
from .structured import Grammar, json_schema, regex

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineStats",
    "Grammar",
    "Prompt",
    "SamplingParams",
    "json_schema",
    "regex",
]
