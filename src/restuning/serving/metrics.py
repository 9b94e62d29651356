"""What the server counts, for Prometheus."""

from typing import Any

from restuning.errors import MissingExtra

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counters of one server, in a registry of their own. A forward is one item through the backbone: what answered
    its other tasks from the same one has been saved."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MissingExtra("prometheus-client", "serve") from error
        self._prometheus = prometheus
        self.registry = registry = prometheus.CollectorRegistry()
        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram

        def made(kind: Any, name: str, about: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            return kind(f"restuning_{name}", about, labels, registry=registry, **more)

        self.requests = made(counter, "requests", "Requests by route and status", ("route", "status"))
        self.answers = made(counter, "answers", "Answers, one an item and task, by task and status", ("task", "status"))
        self.refused = made(counter, "queue_refusals", "Requests refused because the queue was full")
        self.retries = made(counter, "retries", "Requests sent again, since the replica that had them died")
        self.left = made(counter, "clients_left", "Requests whose client left before its answer")
        self.queued = made(gauge, "queue_items", "Items that wait")
        self.queue_seconds = made(histogram, "queue_seconds", "Seconds that a request waits", buckets=SECONDS)
        self.inference_seconds = made(histogram, "inference_seconds", "Seconds of a batch", buckets=SECONDS)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch_items = made(histogram, "batch_items", "Items of a batch", buckets=sizes)
        self.adapters = made(gauge, "adapters", "Adapters that are served")
        self.forwards = made(counter, "forwards", "Items that went through the backbone")
        self.saved = made(counter, "forwards_saved", "Items that did not, since an answer shared another's forward")
        self.passes = made(counter, "passes", "Passes of the backbone")

    def forget(self, task: str) -> None:
        """Drop the counts of a task that is served no more."""
        for status in ("ok", "error"):
            try:
                self.answers.remove(task, status)
            except KeyError:
                continue

    def text(self) -> tuple[bytes, str]:
        """What /metrics gives, and its content type."""
        return self._prometheus.generate_latest(self.registry), self._prometheus.CONTENT_TYPE_LATEST
