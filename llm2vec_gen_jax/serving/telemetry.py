"""Prometheus metrics of the server."""

from collections.abc import Callable
from typing import Any

import prometheus_client
from starlette.requests import Request
from starlette.responses import Response


class Telemetry:
    """Metrics and the page that exposes them. The arguments return the current values of the gauges."""

    def __init__(
        self,
        waiting: Callable[[], float],
        in_flight: Callable[[], float],
        ready: Callable[[], float],
        decoding_ready: Callable[[], float],
    ) -> None:
        self.registry = registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)

        def make(kind, name, description, *labels, **options):
            return kind(f"llm2vec_gen_{name}", description, labels, registry=registry, **options)

        counter, gauge, histogram = (getattr(prometheus_client, name) for name in ("Counter", "Gauge", "Histogram"))
        counts = {"buckets": [2**power for power in range(13)]}
        self._requests = make(counter, "requests", "requests", "endpoint", "status")
        self._seconds = make(
            histogram, "request_seconds", "time from the headers of a request to its response", "endpoint"
        )
        self._texts = make(counter, "texts", "texts embedded for /v1/embeddings and /embed")
        self._tokens = make(counter, "tokens", "tokens embedded for /v1/embeddings and /embed")
        self._batch_items = make(histogram, "batch_items", "texts per batch", "kind", **counts)
        self._batch_requests = make(histogram, "batch_requests", "requests per batch", "kind", **counts)
        self._batch_seconds = make(histogram, "batch_seconds", "computation time of a batch", "kind")
        self._waited = make(histogram, "waited_seconds", "queue time of the oldest request of a batch", "kind")
        make(gauge, "waiting", "texts in the queue").set_function(waiting)
        make(gauge, "in_flight", "requests being read or answered").set_function(in_flight)
        make(gauge, "ready", "whether embeddings are served").set_function(ready)
        make(gauge, "decoding_ready", "whether /v1/decode is served").set_function(decoding_ready)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts a request. seconds: from its headers to its response."""
        self._requests.labels(endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def embedded(self, texts: int, tokens: int) -> None:
        """Counts embedded texts and their tokens."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)

    def batch(self, kind: Any, waited: float, requests: int, items: int, seconds: float) -> None:
        """Counts a batch. waited: seconds that its oldest request was in the queue; seconds: of its computation."""
        for metric, value in (
            (self._waited, waited),
            (self._batch_requests, requests),
            (self._batch_items, items),
            (self._batch_seconds, seconds),
        ):
            metric.labels(kind[0]).observe(value)

    async def page(self, request: Request) -> Response:
        """GET /metrics, in Prometheus' text format."""
        return Response(
            prometheus_client.generate_latest(self.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )
