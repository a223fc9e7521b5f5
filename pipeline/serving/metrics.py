"""What Prometheus is told. No label takes a value that clients choose."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_PREFIX = "moco_serve_"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = tuple(2**power for power in range(11))


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, queue_depth: Callable[[], int]) -> None:
        """Registers them.

        Args:
            queue_depth: rows admitted and not yet answered.
        """
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "Requests answered", "api", "method", "code")
        self._errors = self._counter("errors", "Requests refused and rows that failed", "kind")
        self._seconds = self._histogram(
            "request_seconds", "From a request's head to its answer", _SECONDS, "api", "method"
        )
        self._rows = self._histogram("batch_rows", "Rows in a call of the model", _ROWS)
        self._batch_seconds = self._histogram("batch_seconds", "Seconds of a call of the model", _SECONDS)
        self._version = Gauge(_PREFIX + "version", "Version in service", registry=self._registry)
        depth = Gauge(_PREFIX + "queue_rows", "Rows admitted and not yet answered", registry=self._registry)
        depth.set_function(queue_depth)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(_PREFIX + name, what, labels, buckets=buckets, registry=self._registry)

    def answered(self, api: str, method: str, code: str, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(api, method, code).inc()
        self._seconds.labels(api, method).observe(seconds)

    def failed(self, kind: str) -> None:
        """Counts an error."""
        self._errors.labels(kind).inc()

    def computed(self, rows: int, seconds: float) -> None:
        """Counts a batch."""
        self._rows.observe(rows)
        self._batch_seconds.observe(seconds)

    def in_service(self, version: int) -> None:
        """Notes the version."""
        self._version.set(version)

    def page(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
