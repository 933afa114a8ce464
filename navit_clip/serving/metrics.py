"""What a server counts of itself, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_POWERS = tuple(4**power for power in range(9))


class Metrics:
    """Counters of one server; several in a process do not meet."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        labels = ("path", "status")
        self._requests = Counter("navit_requests", "Answers.", labels, registry=registry)
        self._seconds = Histogram(
            "navit_request_seconds",
            "From a request's first byte to its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._waiting = Gauge("navit_waiting_tokens", "Waiting for the model.", registry=registry)
        self._batch_inputs, self._batch_tokens = (
            Histogram(f"navit_batch_{what}", f"{what.capitalize()} of a forward pass.",
                      buckets=_POWERS, registry=registry)
            for what in ("inputs", "tokens")
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "navit_batch_seconds", "Of a forward pass.", buckets=_SECONDS, registry=registry
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def waiting(self, tokens: int) -> None:
        """Notes how many tokens wait."""
        self._waiting.set(tokens)

    def batch(self, inputs: int, tokens: int, seconds: float) -> None:
        """Counts a forward pass."""
        self._batch_inputs.observe(inputs)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        return generate_latest(self._registry)
