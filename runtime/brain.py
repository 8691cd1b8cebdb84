"""One answer for both pools: puts the front ends' reports together and asks the policy.

`Brain` has no clock and no I/O of its own. In a fleet with several front ends, or one that scales, it lives in a
deployment of its own (`runtime.scaler`); a single front end without scaling has one to itself, for its metrics.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

from runtime.client_view import BOUNDS_S, Totals
from runtime.policy.demand import KV_FULL, PoolLoad
from runtime.policy.scaling import scale
from runtime.policy.scaling_records import Answer, FleetLoad, Memory, PoolAnswer, ScalingSettings
from runtime.policy.types import Cost
from runtime.reports import FleetStatus, FrontEndReport, WorkerReport

RATE_S = 15.0
"""Rates are means over this time."""

LATENCY_S = 60.0
"""Percentiles are of the requests of this time."""

SILENT_S = 10.0
"""A front end that has reported nothing for this long is forgotten."""

READY, DRAINING, REFUSED = "ready", "draining", "refused"

Replicas = Mapping[str, Mapping[str, int]]
"""For each pool how many replicas Ray Serve has in each of its states."""

Window = list[tuple[FrontEndReport, FrontEndReport, float]]
"""For each front end an older report, its last one, and the seconds between them."""


@dataclass
class _Told:
    """What a front end has said."""

    last: FrontEndReport
    history: deque[tuple[float, FrontEndReport]] = field(default_factory=deque)

    def before(self, now: float, seconds: float) -> tuple[float, FrontEndReport]:
        """The oldest report of the last `seconds`."""
        times = [at for at, _ in self.history]
        return self.history[min(bisect_right(times, now - seconds), len(times) - 1)]


class Brain:
    """Puts reports together and decides.

    Args:
        settings: None when nobody scales: the answer is then what was given, or what there is if that is more.
        given: so many workers each pool was given.
    """

    def __init__(self, settings: ScalingSettings | None, given: Mapping[str, int]) -> None:
        self._settings = settings
        self._given = given
        self._told: dict[str, _Told] = {}
        self._memory: Memory | None = None

    def tell(self, report: FrontEndReport, now: float) -> None:
        """Take a front end's report."""
        told = self._told.setdefault(report.front_end, _Told(report))
        told.last = report
        told.history.append((now, report))
        while told.history[0][0] < now - LATENCY_S:
            told.history.popleft()

    def decide(self, now: float, replicas: Replicas | None = None) -> FleetStatus | None:
        """The load and the answer; None while nobody has reported."""
        for front_end, told in list(self._told.items()):
            if now - told.history[-1][0] > SILENT_S:
                del self._told[front_end]
        if not self._told:
            return None
        load = self._load(now, replicas)
        if self._settings is None:
            answer = Answer(self._unscaled("prefill", load.prefill), self._unscaled("decode", load.decode))
        else:
            answer, self._memory = scale(load, self._settings, self._memory)
        front_ends = tuple((r.front_end, r.metrics_host, r.metrics_port) for r in self._reports())
        return FleetStatus(load, answer, self._settings is not None, front_ends)

    def _unscaled(self, pool: str, load: PoolLoad) -> PoolAnswer:
        return PoolAnswer(max(self._given[pool], load.workers), "steady", "not scaled")

    def _reports(self) -> list[FrontEndReport]:
        return [told.last for told in self._told.values()]

    def _load(self, now: float, replicas: Replicas | None) -> FleetLoad:
        rates = self._window(now, RATE_S)
        prefill = replace(
            self._pool("prefill", replicas),
            arriving_tokens_s=_rate(rates, lambda totals: totals.read),
            lent_tokens_s=_rate(rates, lambda totals: totals.read_for_prefill),
        )
        decode = replace(
            self._pool("decode", replicas),
            arriving_tokens_s=_rate(rates, lambda totals: totals.read_by_decode),
            lent_tokens_s=_rate(rates, lambda totals: totals.written_by_prefill),
            tokens_s=_rate(rates, lambda totals: totals.written - totals.written_by_prefill),
        )
        waiting = sum(report.waiting for report in self._reports())
        tokens = sum(report.waiting_tokens for report in self._reports())
        if waiting and _is_full(decode):
            decode = replace(decode, queued_requests=decode.queued_requests + waiting)
        elif waiting:
            prefill = replace(
                prefill,
                queued_requests=prefill.queued_requests + waiting,
                queued_tokens=prefill.queued_tokens + tokens,
            )
        latencies = self._window(now, LATENCY_S)
        wanted = self._settings.demand.objectives.percentile if self._settings else 0.99
        return FleetLoad(
            now,
            prefill,
            decode,
            waiting,
            ttft_s=percentile(_grown((old.ttft, new.ttft) for old, new, _ in latencies), wanted),
            itl_s=percentile(_grown((old.itl, new.itl) for old, new, _ in latencies), wanted),
        )

    def _window(self, now: float, seconds: float) -> Window:
        window = []
        for told in self._told.values():
            at, old = told.before(now, seconds)
            window.append((old, told.last, told.history[-1][0] - at))
        return window

    def _pool(self, pool: str, replicas: Replicas | None) -> PoolLoad:
        """The workers of a pool: each front end knows them, and what they hold of its own work most recently."""
        by_worker: dict[str, list[WorkerReport]] = {}
        for report in self._reports():
            for worker in report.workers:
                if worker.pool == pool:
                    by_worker.setdefault(worker.engine_id, []).append(worker)
        ready = [
            [worker for worker in reports if worker.state == READY]
            for reports in by_worker.values()
            if any(worker.state == READY for worker in reports)
        ]
        draining = sum(all(worker.state == DRAINING for worker in reports) for reports in by_worker.values())
        refused = sum(all(worker.state == REFUSED for worker in reports) for reports in by_worker.values())
        coming = len(by_worker) - len(ready) - draining - refused
        if replicas is not None:
            states = replicas.get(pool, {})
            draining = states.get("STOPPING", 0)
            coming = max(0, sum(states.values()) - draining - len(ready))
        uses = [max(known) for reports in ready if (known := [w.kv_use for w in reports if w.kv_use is not None])]
        blocks = sum(reports[0].num_blocks for reports in ready)
        return PoolLoad(
            ready=len(ready),
            starting=coming,
            draining=draining,
            queued_requests=sum(max(w.queued_requests for w in reports) for reports in ready),
            queued_tokens=sum(max(w.queued_tokens for w in reports) for reports in ready),
            streams=sum(max(w.streams for w in reports) for reports in ready),
            kv_use=fmean(uses) if uses else 0.0,
            pinned_kv=sum(w.pinned_blocks for reports in ready for w in reports) / blocks if blocks else 0.0,
            read=_mean_cost([w.read for reports in ready for w in reports if w.read]),
            step=_mean_cost([w.step for reports in ready for w in reports if w.step]),
            max_streams=max((w.max_streams for reports in ready for w in reports if w.max_streams), default=None),
        )


def _is_full(decode: PoolLoad) -> bool:
    """Whether who waits at the front end waits for decode: there are no places or blocks to be had."""
    places = (decode.max_streams or 0) * decode.ready
    return decode.kv_use > KV_FULL or (places > 0 and decode.streams >= 0.95 * places)


def _rate(window: Window, count: Callable[[Totals], int]) -> float:
    return sum((count(new.totals) - count(old.totals)) / seconds for old, new, seconds in window if seconds > 0)


def _mean_cost(costs: list[Cost]) -> Cost | None:
    if not costs:
        return None
    return Cost(fmean(cost.fixed_s for cost in costs), fmean(cost.each_s for cost in costs))


def _grown(pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[int]:
    counts = [0] * (len(BOUNDS_S) + 1)
    for old, new in pairs:
        counts = [count + after - before for count, before, after in zip(counts, old, new, strict=True)]
    return counts


def percentile(counts: list[int], part: float) -> float | None:
    """The value below which `part` of what was counted over `BOUNDS_S` lies, within its bucket by proportion."""
    rest = part * sum(counts)
    if not rest:
        return None
    low = 0.0
    for bound, count in zip(BOUNDS_S, counts, strict=False):
        if count and rest <= count:
            return low + (bound - low) * rest / count
        rest -= count
        low = bound
    return BOUNDS_S[-1]
