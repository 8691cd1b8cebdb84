"""The fleet in figures: pools and workers as this front end knows them, for Prometheus and for `/baton/fleet`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.metrics import REFUSALS
from runtime.policy.scaling_records import REASONS
from runtime.reports import FleetStatus, WorkerReport, report
from runtime.worker import State

if TYPE_CHECKING:
    from runtime.cluster import Cluster
    from runtime.reporter import Reporter

POOLS = ("prefill", "decode")


class PoolMetrics:
    """A Prometheus collector over a front end's cluster and the last answer of who sizes the pools."""

    def __init__(self, cluster: Cluster, reporter: Reporter) -> None:
        self._cluster = cluster
        self._reporter = reporter

    def collect(self) -> Iterator[Metric]:
        """Prometheus' hook for a scrape; only reads what the event loop keeps."""
        yield self._workers()
        yield self._starts()
        yield from self._tokens()
        oldest = GaugeMetricFamily("baton_handoff_oldest_seconds", "Age of the oldest outstanding handoff.")
        oldest.add_metric([], self._cluster.ledger.oldest_s())
        yield oldest
        yield from self._pools(self._reporter.believed())

    def _workers(self) -> Metric:
        family = GaugeMetricFamily(
            "baton_pool_workers", "Workers of a pool by their state to this front end.", labels=["pool", "state"]
        )
        counts = Counter((w.link.facts.role, w.state) for w in list(self._cluster.fleet.workers.values()))
        for pool in POOLS:
            for state in State:
                family.add_metric([pool, state.value], counts[pool, state])
        return family

    def _starts(self) -> Metric:
        family = GaugeMetricFamily(
            "baton_worker_start_seconds",
            "Seconds that each phase of the worker's start took.",
            labels=["worker", "pool", "phase"],
        )
        for engine_id, worker in list(self._cluster.fleet.workers.items()):
            for phase, seconds in list(worker.start_s.items()):
                family.add_metric([engine_id, worker.link.facts.role, phase], seconds)
        return family

    def _tokens(self) -> Iterator[Metric]:
        totals = self._cluster.seen.totals
        read = CounterMetricFamily(
            "baton_prompt_tokens", "Uncached prompt tokens by the pool that was to read them.", labels=["pool", "lent"]
        )
        read.add_metric(["prefill", "no"], totals.read)
        read.add_metric(["decode", "no"], totals.read_by_decode)
        read.add_metric(["decode", "yes"], totals.read_for_prefill)
        yield read
        written = CounterMetricFamily(
            "baton_answer_tokens", "Tokens that went to clients by the pool that wrote them.", labels=["pool"]
        )
        written.add_metric(["decode"], totals.written - totals.written_by_prefill)
        written.add_metric(["prefill"], totals.written_by_prefill)
        yield written

    def _pools(self, status: FleetStatus | None) -> Iterator[Metric]:
        gauges = {
            name: GaugeMetricFamily(f"baton_pool_{name}", text, labels=["pool"])
            for name, text in (
                ("queue_depth", "Requests that wait for this pool, in its engines and at the front ends."),
                ("backlog_seconds", "Seconds that the pool's ready workers need for what is queued."),
                ("streams", "Requests that write an answer on this pool."),
                ("kv_use_ratio", "Part of the ready workers' KV blocks that is held, 0 to 1."),
                ("desired_replicas", "Workers that the pool should have: what everything that scales follows."),
            )
        }
        reasons = GaugeMetricFamily(
            "baton_pool_reason", "1 for the reason of the pool's desired size.", labels=["pool", "reason"]
        )
        for pool in POOLS if status is not None else ():
            load, answer = getattr(status.load, pool), getattr(status.answer, pool)  # type: ignore[union-attr]
            figures = (load.queued_requests, load.backlog_s, load.streams, load.kv_use, answer.workers)
            for gauge, figure in zip(gauges.values(), figures, strict=True):
                gauge.add_metric([pool], figure)
            for reason in REASONS:
                reasons.add_metric([pool, reason], float(reason == answer.reason))
        yield from gauges.values()
        yield reasons


def fleet_snapshot(cluster: Cluster, reporter: Reporter) -> dict[str, Any]:
    """The fleet as JSON: what `baton top` shows, and what a script may read.

    Keys: `front_end`; `pools` by name with `load`, `answer` and `scaled`, none while nobody answers for their sizes;
    `workers`, one each; `waiting` requests; `latency` of clients lately; `recent`, the last deaths and the like;
    `refusals` so far by reason.
    """
    mine = report(reporter.front_end, cluster)
    status = reporter.believed()
    pools: dict[str, Any] = {}
    for pool in POOLS if status is not None else ():
        load, answer = getattr(status.load, pool), getattr(status.answer, pool)  # type: ignore[union-attr]
        pools[pool] = {
            "load": {**asdict(load), "backlog_s": load.backlog_s},
            "answer": asdict(answer),
            "scaled": status.scaled,  # type: ignore[union-attr]
        }
    return {
        "front_end": reporter.front_end,
        "pools": pools,
        "workers": [_worker_record(worker) for worker in mine.workers],
        "waiting": {"requests": mine.waiting, "tokens": mine.waiting_tokens},
        "latency": {
            "ttft_s": status.load.ttft_s if status else None,
            "itl_s": status.load.itl_s if status else None,
        },
        "totals": asdict(mine.totals),
        "recent": list(cluster.fleet.events),
        "refusals": {s.labels["reason"]: s.value for f in REFUSALS.collect() for s in f.samples if "_total" in s.name},
    }


def _worker_record(worker: WorkerReport) -> dict[str, Any]:
    free = None if worker.kv_use is None else round((1.0 - worker.kv_use) * worker.num_blocks)
    return {
        "engine_id": worker.engine_id,
        "role": worker.pool,
        "state": worker.state,
        "queued_requests": worker.queued_requests,
        "queued_tokens": worker.queued_tokens,
        "streams": worker.streams,
        "free_blocks": free,
        "num_blocks": worker.num_blocks,
    }
