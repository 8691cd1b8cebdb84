"""What clients get to see of their streams, measured in the front end: TTFT, times between tokens, gaps, ends.

Histograms are counted in plain lists, once per step and request, and turned into Prometheus families when somebody
scrapes: a lock and a label look-up for each token would be the dearest thing on the token path.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from runtime.policy.objectives import Objectives
from runtime.policy.types import Disaggregated, Plan

BOUNDS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.45, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Upper bounds of the histograms' buckets. The presets of the objectives are among them."""

LENT = ("decode_idle", "no_prefill_workers")
"""Reasons for which a decode worker reads a prompt that is prefill's to read."""


class Times:
    """A histogram over `BOUNDS_S`. Not for several threads."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count `seconds`, so many times."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += times
        self.total_s += seconds * times

    def family(self, name: str, text: str) -> Metric:
        """As Prometheus wants it."""
        buckets, below = [], 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.total_s)


@dataclass(eq=False, slots=True)
class StreamClock:
    """One request's times, on the monotonic clock. `first_s` and `last_s` are 0 before the first token."""

    arrived_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    longest_s: float = 0.0
    tokens: int = 0
    lent: bool = False  # a prefill worker writes it

    @classmethod
    def since(cls, arrival: float) -> StreamClock:
        """For a request that arrived at `arrival` on the wall clock, before it was tokenized."""
        return cls(time.monotonic() - max(0.0, time.time() - arrival))


@dataclass(slots=True)
class Totals:
    """Tokens since the start: differences over time are the rates that scaling goes by."""

    read: int = 0  # uncached prompt tokens planned for prefill workers
    read_by_decode: int = 0  # planned for decode workers, as their own
    read_for_prefill: int = 0  # planned for decode workers, in prefill's place
    written: int = 0  # tokens of answers
    written_by_prefill: int = 0  # of those, by prefill workers


class ClientView:
    """What all clients of this front end see. A Prometheus collector."""

    def __init__(self, objectives: Objectives | None = None) -> None:
        self.objectives = objectives or Objectives()
        self.ttft, self.itl, self.longest_gap, self.whole = Times(), Times(), Times(), Times()
        self.totals = Totals()
        self._ended: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()

    def planned(self, clock: StreamClock, plan: Plan, prompt_tokens: int, *, on_prefill: bool) -> None:
        """A request was given its plan; `on_prefill`: a prefill worker writes it."""
        tokens = plan.predicted.uncached_tokens if plan.predicted else prompt_tokens
        clock.lent = on_prefill
        if isinstance(plan, Disaggregated) or on_prefill:
            self.totals.read += tokens
        elif plan.reason in LENT:
            self.totals.read_for_prefill += tokens
        else:
            self.totals.read_by_decode += tokens

    def tokens(self, clock: StreamClock, count: int, now: float) -> None:
        """Tokens go to the client. The hot path: once for each step and request."""
        if not count:
            return
        if clock.first_s:
            gap = now - clock.last_s
            self.itl.observe(gap / count, count)
            clock.longest_s = max(clock.longest_s, gap)
        else:
            clock.first_s = now
            self.ttft.observe(now - clock.arrived_s)
        clock.last_s = now
        clock.tokens += count
        self.totals.written += count
        self.totals.written_by_prefill += count if clock.lent else 0

    def ended(self, clock: StreamClock, outcome: str, now: float) -> None:
        """A request is over: `done`, `failed`, `refused`, or `aborted` (the client left, or a stop string came)."""
        self._ended[outcome] += 1
        if outcome == "done":
            self.whole.observe(now - clock.arrived_s)
        if not clock.first_s:
            return
        if clock.tokens > 1:
            self.longest_gap.observe(clock.longest_s)
            mean_s = (clock.last_s - clock.first_s) / (clock.tokens - 1)
            self._missed["itl"] += mean_s > self.objectives.itl_s
        self._missed["ttft"] += clock.first_s - clock.arrived_s > self.objectives.ttft_s

    def describe(self) -> Iterator[Metric]:
        """For Prometheus' registry: the names, without counting anything."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Prometheus' hook for a scrape."""
        yield self.ttft.family(
            "baton_time_to_first_token_seconds", "From a request's arrival until its first token left for the client."
        )
        yield self.itl.family(
            "baton_inter_token_seconds", "Between two tokens of a stream, as they left for the client."
        )
        yield self.longest_gap.family("baton_longest_gap_seconds", "The longest silence within each stream.")
        yield self.whole.family("baton_request_seconds", "From a request's arrival until its last token.")
        ended = CounterMetricFamily("baton_requests", "Requests that are over, by how they ended.", labels=["outcome"])
        for outcome in ("done", "failed", "refused", "aborted"):
            ended.add_metric([outcome], self._ended[outcome])
        yield ended
        missed = CounterMetricFamily(
            "baton_objective_missed", "Requests that missed an objective.", labels=["objective"]
        )
        limits = GaugeMetricFamily("baton_objective_seconds", "The objectives.", labels=["objective"])
        for name, limit_s in (("ttft", self.objectives.ttft_s), ("itl", self.objectives.itl_s)):
            missed.add_metric([name], self._missed[name])
            limits.add_metric([name], limit_s)
        yield missed
        yield limits
