"""Prometheus counters and gauges of the adapter service; vLLM shows them at /metrics."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class AdapterMetrics:
    """Registers once in a registry; gauges of several processes show the newest value."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"hl_scale_{name}", text, registry=registry, multiprocess_mode="mostrecent")

        self.requests = Counter(
            "hl_scale_adapter_requests",
            "adapters that the engine did not know, by outcome: generated, cached (on disk), joined (one under way), "
            "refused (no such condition), busy (too many at once), failed",
            ["outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "hl_scale_adapter_generation_seconds", "one generation, without waiting", buckets=SECONDS, registry=registry
        )
        self.evictions = Counter("hl_scale_adapter_evictions", "adapters removed for want of room", registry=registry)
        self.damaged = Counter("hl_scale_adapter_damaged", "cached adapters made again", registry=registry)
        self.adapters = gauge("adapters", "adapters in the cache")
        self.cache_bytes = gauge("adapter_cache_bytes", "bytes of the cache")
        self.waiting = gauge("adapter_generations_waiting", "adapters being generated or waiting for it")
        self.starts = gauge("adapter_generator_starts", "times the generator process was started")
