"""What /metrics tells Prometheus."""
from __future__ import annotations

from typing import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """waiting, running: images without and with a slot, now."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mini_dalle_requests", "Requests, by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "mini_dalle_request_seconds", "Seconds from a request to the end of its answer", ["route"],
            registry=registry, buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300),
        )  # fmt: skip
        self.images = Counter("mini_dalle_images", "Images that are complete", registry=registry)
        self.ended = Counter("mini_dalle_images_ended", "Images that were ended before they were complete",
                             registry=registry)
        self.batch = Histogram(
            "mini_dalle_batch_images", "Images in a pass of the model", registry=registry,
            buckets=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96),
        )  # fmt: skip
        Gauge("mini_dalle_waiting_images", "Images that wait for a slot", registry=registry).set_function(waiting)
        Gauge("mini_dalle_running_images", "Images that have a slot", registry=registry).set_function(running)

    def text(self) -> bytes:
        """All of them in Prometheus's format."""
        return generate_latest(self.registry)
