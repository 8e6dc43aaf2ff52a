"""What the server counts, for Prometheus."""

import prometheus_client
from starlette.responses import Response


class Telemetry:
    """The metrics of a Server, and the page that shows them."""

    def __init__(self, server):
        self.registry = registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)

        def make(kind, name, about, *labels, **options):
            return kind(f"llm2vec_gen_{name}", about, labels, registry=registry, **options)

        counter, gauge, histogram = (getattr(prometheus_client, name) for name in ("Counter", "Gauge", "Histogram"))
        counts = {"buckets": [2**power for power in range(13)]}
        self._requests = make(counter, "requests", "requests", "endpoint", "status")
        self._seconds = make(histogram, "request_seconds", "from a request's headers to its answer", "endpoint")
        self._texts = make(counter, "texts", "texts that were embedded for /v1/embeddings")
        self._tokens = make(counter, "tokens", "tokens of those texts")
        self._batch_items = make(histogram, "batch_items", "texts computed together", "kind", **counts)
        self._batch_requests = make(histogram, "batch_requests", "requests computed together", "kind", **counts)
        self._batch_seconds = make(histogram, "batch_seconds", "of the model on a batch", "kind")
        self._waited = make(histogram, "waited_seconds", "of the oldest request of a batch", "kind")
        make(gauge, "waiting", "texts that wait").set_function(lambda: server.engine.batcher.waiting)
        make(gauge, "in_flight", "requests being read or answered").set_function(lambda: server.in_flight)
        make(gauge, "ready", "whether everything is compiled").set_function(lambda: server.ready)

    def request(self, endpoint, status, seconds):
        """Counts an answered request: its status, and its seconds from headers to answer."""
        self._requests.labels(endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def read(self, texts, tokens):
        """Counts embedded texts and their tokens."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)

    def batch(self, kind, waited, requests, items, seconds):
        """Counts what was computed together; waited: seconds of its oldest request."""
        for metric, value in (
            (self._waited, waited),
            (self._batch_requests, requests),
            (self._batch_items, items),
            (self._batch_seconds, seconds),
        ):
            metric.labels(kind[0]).observe(value)

    async def page(self, request):
        """GET /metrics, in Prometheus' text format."""
        return Response(
            prometheus_client.generate_latest(self.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )
