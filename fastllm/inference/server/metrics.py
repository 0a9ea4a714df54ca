"""Metrics for Prometheus, at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)

_GAUGES = {
    "running": ("requests_running", "Answers that the engine computes."),
    "waiting": ("requests_waiting", "Answers that wait for a place in the batch or for pages."),
    "pages": ("pages", "Pages of the key/value pool."),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "cached_tokens": ("cached_prompt_tokens", "Tokens of prompts whose keys and values were known."),
    "generated_tokens": ("generated_tokens", "Tokens of answers."),
    "proposed_tokens": ("speculation_proposed_tokens", "Tokens that a draft proposed."),
    "accepted_tokens": ("speculation_accepted_tokens", "Proposed tokens that the model chose too."),
}


class _EngineCollector(Collector):
    """The engine's counts at the time of the question."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field, (name, what) in _GAUGES.items():
            yield GaugeMetricFamily(f"fastllm_{name}", what, getattr(stats, field))
        yield GaugeMetricFamily("fastllm_pages_used", "Pages that requests hold.", stats.pages - stats.free_pages)
        for field, (name, what) in _COUNTERS.items():
            yield CounterMetricFamily(f"fastllm_{name}", what, getattr(stats, field))


class Metrics:
    """A registry of its own: nothing of another server in this process is in it."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        registry.register(_EngineCollector(stats))

        def seconds(name: str, what: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"fastllm_{name}_seconds", what, buckets=buckets, registry=registry)

        self.requests = Counter("fastllm_requests", "Answered requests.", ("endpoint", "status"), registry=registry)
        self.first_token = seconds("time_to_first_token", "From a request to its first token.")
        self.between_tokens = seconds("time_between_tokens", "From one token of an answer to the next.", _BETWEEN)
        self.queue = seconds("queue", "From a request to the beginning of its computation.")
        self.whole = seconds("request", "From a request to the end of its answers.")

    def text(self) -> bytes:
        return generate_latest(self._registry)
