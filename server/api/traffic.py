"""What the API workers themselves count: HTTP requests, and the sizes of what is asked for together.

With several workers each writes its numbers into files of the run directory, where prometheus-client adds them up,
those of workers that are gone included. It learns of the directory from a variable that the supervisor sets for its
workers; without one, as in a test's process, the numbers stay in memory.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import Scope

from ..engine.counts import FEW, SECONDS
from ..engine.request import ModelCard

PREFIX = "tandem:"
NO_ROUTE = "none"  # the handler of a path that no route has; so its names are not counted one by one
METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"})


class Traffic:
    def __init__(self, directory: str | None = None) -> None:
        """`directory`: where all workers write; None: this one is alone."""
        self._directory = directory
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            PREFIX + "http_requests",
            "HTTP requests that were answered; handler is the route, not the path.",
            ["handler", "method", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            PREFIX + "http_request_duration_seconds",
            "From a request's head to the last byte of its answer, streams included.",
            ["handler", "method"],
            buckets=SECONDS,
            registry=registry,
        )
        self._groups = Histogram(
            PREFIX + "score_group_size",
            "Texts that one request wants scores of.",
            ["model_name", "role"],
            buckets=FEW[1:],
            registry=registry,
        )

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        handler = getattr(scope.get("route"), "path", NO_ROUTE)
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(handler, method, str(status)).inc()
        self._seconds.labels(handler, method).observe(seconds)

    def scored(self, card: ModelCard, texts: int) -> None:
        self._groups.labels(card.name, card.role).observe(texts)

    def text(self) -> bytes:
        """Of all workers, in Prometheus' text format."""
        registry = self._registry
        if self._directory is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, path=self._directory)
        return generate_latest(registry)
