"""How many workers a pool's work needs: each signal gives its own answer, and the largest counts.

Load is measured in seconds of work: tokens over what a worker does in a second, as it was measured. A signal has two
figures, so that a pool does not flap: fewer workers than `up` are too few, more than `keep` are too many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.policy.objectives import DEFAULT, Objectives
from runtime.policy.types import Cost

BUSY = 0.85
"""A worker that is busy for more than this part of its time has no room for bursts."""

CALM = 0.6
"""A pool that would be busy for less than this part with a worker less can let one go."""

KV_FULL = 0.85
"""KV use above this part makes a decode engine preempt or make requests wait soon."""

KV_CALM = 0.6

PINNED = 0.5
"""A prefill pool with this part of its KV held by handoffs that decode has not pulled waits for decode."""


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """One pool at one moment, over all front ends. Rates are means over the last tens of seconds.

    Attributes:
        ready: workers that take work.
        starting: workers that will be ready without anybody asking for more (placed, loading, warming).
        draining: workers that finish what they have.
        queued_requests: requests that wait for this pool or whose prompts are being read.
        queued_tokens: uncached prompt tokens of those.
        arriving_tokens_s: uncached prompt tokens a second that came for this pool to read.
        lent_tokens_s: tokens a second of this pool's own work (prompt tokens for prefill, written ones for decode)
            that the other pool did for it.
        tokens_s: tokens a second that its streams wrote.
        streams: requests that write.
        kv_use: part of the ready workers' KV blocks that is held, 0 to 1.
        pinned_kv: the part of those blocks that waits to be pulled.
        read: what reading a prompt costs, for each prompt and each token. None while unmeasured.
        step: what a decode step costs, fixed and for each stream. None while unmeasured.
        max_streams: most streams in one step of a worker.
    """

    ready: int = 0
    starting: int = 0
    draining: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    arriving_tokens_s: float = 0.0
    lent_tokens_s: float = 0.0
    tokens_s: float = 0.0
    streams: int = 0
    kv_use: float = 0.0
    pinned_kv: float = 0.0
    read: Cost | None = None
    step: Cost | None = None
    max_streams: int | None = None

    @property
    def workers(self) -> int:
        """Those that are ready and those that will be."""
        return self.ready + self.starting

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not (self.queued_requests or self.queued_tokens or self.streams or self.arriving_tokens_s)

    @property
    def work_s(self) -> float:
        """Seconds that one worker would need for what is queued."""
        if self.read is None:
            return 0.0
        return self.read.fixed_s * self.queued_requests + self.read.each_s * self.queued_tokens

    @property
    def backlog_s(self) -> float:
        """Seconds that the ready workers need for what is queued."""
        return self.work_s / max(1, self.ready)


@dataclass(frozen=True, slots=True)
class DemandSettings:
    """What demand is measured by.

    Attributes:
        rule: `work` measures seconds of work; `queue_depth` is the simple rule, requests that wait for each worker.
        queue_depth: waiting requests for each worker beyond which more workers are needed.
        clear_s: queued work is to be done within this time.
    """

    rule: Literal["work", "queue_depth"] = "work"
    queue_depth: float = 5.0
    clear_s: float = 10.0
    objectives: Objectives = DEFAULT


@dataclass(frozen=True, slots=True)
class Signal:
    """One answer: fewer than `up` workers are too few, more than `keep` too many."""

    reason: str  # one of `runtime.policy.scaling_records.REASONS`
    up: float
    keep: float
    why: str


def prefill_signals(load: PoolLoad, settings: DemandSettings) -> list[Signal]:
    """What the prompts need: those that arrive, and those that wait."""
    if settings.rule == "queue_depth" or load.read is None:
        return [_queue_depth(load, settings)]
    tokens_s = load.arriving_tokens_s + load.lent_tokens_s
    arriving = load.read.each_s * tokens_s
    backlog = load.work_s / settings.clear_s
    return [
        Signal("arrivals", arriving / BUSY, arriving / CALM, f"{tokens_s:.0f} uncached tokens/s arrive"),
        Signal("backlog", arriving + backlog, arriving / CALM + backlog, f"{load.work_s:.1f} s of prompts are queued"),
        _kv(load, load.kv_use - load.pinned_kv),  # what waits for decode is not for more prefill workers to solve
    ]


def decode_signals(load: PoolLoad, settings: DemandSettings) -> list[Signal]:
    """What the streams need: tokens a second, places in a step, and KV blocks."""
    kv = _kv(load, load.kv_use)
    places = places_of(load, settings.objectives)
    if settings.rule == "queue_depth" or load.step is None or places is None:
        return [_queue_depth(load, settings), kv]
    tokens_s = load.tokens_s + load.lent_tokens_s
    velocity = places / load.step.of(places)
    reading = load.read.each_s * load.arriving_tokens_s if load.read else 0.0
    wanted = load.streams + load.queued_requests
    up = wanted / places
    return [
        Signal(
            "tokens",
            tokens_s / velocity / BUSY + reading,
            tokens_s / velocity / CALM + reading,
            f"{tokens_s:.0f} tokens/s are written, one worker writes {velocity:.0f} within the objective",
        ),
        # Slow workers make streams pile up, so that their number says when there are too few, not when too many.
        Signal("streams", up, up, f"{wanted} streams, {places:.0f} fit on a worker within the objective"),
        kv,
    ]


def places_of(load: PoolLoad, objectives: Objectives) -> float | None:
    """Streams of one worker within the objective; at least one. None when nothing bounds them."""
    bounds = [] if load.max_streams is None else [float(load.max_streams)]
    if load.step is not None and load.step.each_s > 0:
        bounds.append((objectives.itl_s - load.step.fixed_s) / load.step.each_s)
    return max(1.0, min(bounds)) if bounds else None


def waits_for_decode(prefill: PoolLoad) -> bool:
    """Whether prefill's blocks wait to be pulled, so that more prefill workers would only wait too."""
    return prefill.pinned_kv >= PINNED


def ttft_is_prefills_fault(prefill: PoolLoad, objectives: Objectives) -> bool:
    """Whether prompts wait for prefill workers: a long prompt on an idle pool is slow with any number of them."""
    if prefill.read is None:
        return prefill.queued_requests > prefill.ready
    busy = prefill.read.each_s * (prefill.arriving_tokens_s + prefill.lent_tokens_s) / max(1, prefill.ready)
    return prefill.backlog_s > objectives.ttft_s / 4 or busy > CALM


def itl_is_decodes_fault(prefill: PoolLoad, decode: PoolLoad, objectives: Objectives) -> bool:
    """Whether there are too many streams for a worker: not so when decode workers read prompts for prefill."""
    if prefill.lent_tokens_s and prefill.lent_tokens_s >= decode.arriving_tokens_s / 2:
        return False
    places = places_of(decode, objectives)
    if decode.step is None or places is None:
        return decode.streams > decode.ready
    return decode.tokens_s * decode.step.of(places) / places > CALM / 2 * decode.ready


def _queue_depth(load: PoolLoad, settings: DemandSettings) -> Signal:
    per_worker = load.queued_requests / max(1, load.workers)
    up = load.queued_requests / settings.queue_depth if per_worker > settings.queue_depth else 0.0
    keep = (load.queued_requests + load.streams) / settings.queue_depth
    return Signal("queue_depth", up, keep, f"{per_worker:.1f} requests wait for each worker")


def _kv(load: PoolLoad, use: float) -> Signal:
    held = max(0.0, use) * load.ready
    return Signal("kv_guard", held / KV_FULL, held / KV_CALM, f"{use:.0%} of the KV blocks are held")
