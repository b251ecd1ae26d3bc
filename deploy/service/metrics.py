"""What the service counts, in a registry of its own, in Prometheus' text form."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters, gauges and histograms; the process' memory and processor time come with them."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "flowad_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "flowad_request_seconds", "From the head of a request to the end of its answer",
            ["path"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.images = Counter(
            "flowad_images", "Images judged", ["model", "verdict"], registry=registry
        )
        self.waiting = Gauge(
            "flowad_waiting_images", "Images accepted and not answered yet", ["model"],
            registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "flowad_batch_images", "Images that the engine ran at once", ["model"],
            buckets=BATCHES, registry=registry,
        )  # fmt: skip
        self.engine_seconds = Histogram(
            "flowad_engine_seconds", "One run of the engine", ["model"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.nll = Gauge(
            "flowad_nll", "Mean NLL of the latest images, nats per dimension", ["model"],
            registry=registry,
        )  # fmt: skip
        self.drift = Gauge(
            "flowad_drift_z", "Latest images against the normal ones of the training, in standard "
            "errors", ["model"], registry=registry,
        )  # fmt: skip
        self.drift_alarm = Gauge(
            "flowad_drift_alarm", "1 if the latest images differ from the normal ones", ["model"],
            registry=registry,
        )  # fmt: skip
        self.faults = Counter(
            "flowad_engine_faults", "Runs of the engine that failed", ["model"], registry=registry
        )

    def text(self) -> bytes:
        """Return all of them as text."""
        return generate_latest(self._registry)
