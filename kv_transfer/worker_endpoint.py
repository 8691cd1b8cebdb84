"""A worker's own `/metrics`: what vLLM exports of its engine core, and what Baton adds.

vLLM's front end exports its core's scheduler by `PrometheusStatLogger`. In Baton the front end is elsewhere and has
many cores, so each worker runs vLLM's logger itself, on the statistics that come with each engine step. Of what that
logger registers, only the families that are fed here are served: the others are the front end's to tell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kv_transfer.gpu_memory import BytesByGpu

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.loggers import PrometheusStatLogger

logger = logging.getLogger("baton.worker")

ENGINE_FAMILIES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:num_requests_kv_fetch_by_stage",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:external_prefix_cache_queries",
    "vllm:external_prefix_cache_hits",
    "vllm:prompt_tokens_cached_by_source",
)
"""Families of vLLM's that tell of the engine core, beside those of the connector and of speculative decoding."""

ENGINE_PREFIXES = ("vllm:nixl_", "vllm:spec_decode_", "vllm:kv_block_")

PULLS = "baton_worker_pulls"
PULLED_BYTES = "baton_worker_pulled_bytes"
LEASES_EXPIRED = "baton_worker_leases_expired"
FAILED_TRANSFERS = "baton_worker_failed_transfers"
PULLS_HUNG = "baton_worker_pulls_hung"
ORPHANS = "baton_worker_orphans"
FAILED_TASKS = "baton_worker_failed_tasks"
COMPUTED = "baton_worker_prompt_tokens_computed"
COUNTERS = {
    PULLS: ("pulls", "Handoffs whose blocks this worker fetched."),
    PULLED_BYTES: ("pulled_bytes", "KV bytes that this worker fetched."),
    LEASES_EXPIRED: ("leases_expired", "Handoffs whose lease ran out before anybody pulled or released their blocks."),
    FAILED_TRANSFERS: ("failed_transfers", "NIXL transfers of this worker that failed."),
    PULLS_HUNG: ("pulls_hung", "Pulls that were given up because they made no progress."),
    ORPHANS: ("orphans", "Handoffs that this worker had released because their front end was gone."),
    FAILED_TASKS: ("failed_tasks", "Tasks of this worker beside its requests that failed: releases, watches."),
    COMPUTED: ("prompt_tokens_computed", "Prompt tokens that this worker computed."),
}
"""Counters of a worker: their names here, in the engine's `state`, and in words."""


def is_engine_family(name: str) -> bool:
    """Whether a family of vLLM's tells of an engine core, which only its worker knows."""
    return name in ENGINE_FAMILIES or name.startswith(ENGINE_PREFIXES)


class WorkerMetrics:
    """A Prometheus collector over the one engine of this process, and the server for it.

    Args:
        counts: the engine's `state`.
        start_s: seconds of each phase of the start.
        gpu_memory: see `GpuMemory.read`.
    """

    def __init__(
        self,
        counts: Callable[[], dict[str, int]],
        start_s: dict[str, float],
        gpu_memory: Callable[[], BytesByGpu],
    ) -> None:
        self._counts = counts
        self._start_s = start_s
        self._gpu_memory = gpu_memory
        self._logger: PrometheusStatLogger | None = None
        self._served: tuple[Any, Any] | None = None

    def describe_engine(self, vllm_config: Any) -> None:
        """Begin to export what vLLM does; before that, only Baton's own."""
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        self._logger = PrometheusStatLogger(vllm_config)

    def stepped(self, outputs: EngineCoreOutputs) -> None:
        """Take the statistics of one engine step."""
        if self._logger is not None and outputs.scheduler_stats is not None:
            self._logger.record(outputs.scheduler_stats, None)

    def collect(self) -> Iterator[Metric]:
        """Prometheus' hook for a scrape; may run in any thread."""
        for family in REGISTRY.collect():
            if is_engine_family(family.name):
                yield family
        counts = self._counts()
        for name, (key, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=counts.get(key, 0))
        phases = GaugeMetricFamily(
            "baton_worker_start_seconds", "Seconds that each phase of the worker's start took.", labels=["phase"]
        )
        for phase, seconds in self._start_s.items():
            phases.add_metric([phase], seconds)
        yield phases
        yield from _memory_families(self._gpu_memory())

    def serve(self, host: str) -> int:
        """Serve `/metrics` on a free port; returns the port."""
        registry = CollectorRegistry()
        registry.register(self)  # type: ignore[arg-type]  # a collector by its method
        server, thread = start_http_server(0, addr=host, registry=registry)
        self._served = server, thread
        return int(server.server_port)

    def close(self) -> None:
        """Stop serving."""
        if self._served is not None:
            server, thread = self._served
            server.shutdown()
            server.server_close()
            thread.join()
            self._served = None


def counts_of(state: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> Callable[[], dict[str, int]]:
    """The engine's `state`, which belongs to its event loop, for the thread that serves a scrape."""

    def counts() -> dict[str, int]:
        if not loop.is_running():
            return {}
        answer: dict[str, int] = asyncio.run_coroutine_threadsafe(state(), loop).result(timeout=2)
        return answer

    return counts


def _memory_families(memory: BytesByGpu) -> Iterator[Metric]:
    families = (
        GaugeMetricFamily("baton_gpu_memory_used_bytes", "Memory in use on a worker's GPU.", labels=["gpu"]),
        GaugeMetricFamily("baton_gpu_memory_total_bytes", "Memory of a worker's GPU.", labels=["gpu"]),
    )
    for gpu, figures in memory.items():
        for family, figure in zip(families, figures, strict=True):
            family.add_metric([gpu], figure)
    yield from families
