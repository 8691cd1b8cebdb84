"""How many workers each pool should have: a pure function of the load, the settings and what was decided before.

One answer for both pools, which everything that acts follows (Ray Serve, KubeRay, KEDA). Each pool is sized by its own
work (`demand.py`). It grows at once, or after a moment when the other pool has room to help (borrowing comes first),
and shrinks late and in small steps. A pool that had to grow again soon after it had shrunk is shrunk later next time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from runtime.policy.demand import (
    PoolLoad,
    Signal,
    decode_signals,
    itl_is_decodes_fault,
    prefill_signals,
    ttft_is_prefills_fault,
    waits_for_decode,
)
from runtime.policy.scaling_records import (
    Answer,
    FleetLoad,
    Memory,
    PoolAnswer,
    PoolBounds,
    PoolMemory,
    ScalingSettings,
)

FLAP = 3.0
"""A pool that grows within so many times its patience after it had shrunk was shrunk too early."""

LONGEST_PATIENCE_S = 3600.0

EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class _Need:
    """What a pool needs now: too few below `low`, too many above `high`."""

    low: int
    high: int
    reason: str
    why: str


def scale(load: FleetLoad, settings: ScalingSettings, memory: Memory | None) -> tuple[Answer, Memory]:
    """The number of workers for each pool. Pass the memory that came back on to the next call; None at first."""
    if memory is None:
        memory = _first(load, settings)
    idle_since = (load.at_s if memory.idle_since_s is None else memory.idle_since_s) if load.idle else None
    asleep = idle_since is not None and load.at_s - idle_since >= settings.idle_s
    decode = _need(_decode_signals(load, settings, memory))
    prefill = _need(_prefill_signals(load, settings, memory))
    if waits_for_decode(load.prefill) and decode.low >= load.decode.workers and prefill.low > memory.prefill.workers:
        workers = memory.prefill.workers
        prefill = _Need(workers, max(workers, prefill.high), "waits_for_decode", prefill.why)
    prefill, decode = _in_band(prefill, decode, settings.ratio)
    prefill = _bounded(prefill, settings.prefill, asleep=asleep)
    decode = _bounded(decode, settings.decode, asleep=asleep)
    one = _step(prefill, load.prefill, memory.prefill, load.at_s, settings, _spare(decode, load.decode), asleep=asleep)
    two = _step(decode, load.decode, memory.decode, load.at_s, settings, _spare(prefill, load.prefill), asleep=asleep)
    one, two = _within_budget((prefill, load.prefill, one), (decode, load.decode, two), settings)
    return Answer(one, two), Memory(
        _remember(one, prefill, load.prefill, memory.prefill, load.at_s, settings),
        _remember(two, decode, load.decode, memory.decode, load.at_s, settings),
        idle_since,
    )


def _first(load: FleetLoad, settings: ScalingSettings) -> Memory:
    """Start from what there is; pools that are asleep stay so."""
    prefill, decode = (
        PoolMemory(pool.workers, settings.shrink_after_s, load.at_s) for pool in (load.prefill, load.decode)
    )
    asleep = load.idle and not prefill.workers + decode.workers
    return Memory(prefill, decode, load.at_s - settings.idle_s if asleep else None)


def _prefill_signals(load: FleetLoad, settings: ScalingSettings, memory: Memory) -> list[Signal]:
    signals = prefill_signals(load.prefill, settings.demand)
    objectives = settings.demand.objectives
    if settings.demand.rule == "work" and ttft_is_prefills_fault(load.prefill, objectives):
        signals += _over("ttft", load.ttft_s, objectives.ttft_s, load.prefill, memory.prefill, load.at_s, settings)
    return signals


def _decode_signals(load: FleetLoad, settings: ScalingSettings, memory: Memory) -> list[Signal]:
    signals = decode_signals(load.decode, settings.demand)
    objectives = settings.demand.objectives
    if settings.demand.rule == "work" and itl_is_decodes_fault(load.prefill, load.decode, objectives):
        signals += _over("itl", load.itl_s, objectives.itl_s, load.decode, memory.decode, load.at_s, settings)
    return signals


def _over(
    name: str,
    measured_s: float | None,
    limit_s: float,
    load: PoolLoad,
    memory: PoolMemory,
    now_s: float,
    settings: ScalingSettings,
) -> list[Signal]:
    """One worker more while a measured latency is over its objective, none less while it is near it.

    Only once the last change shows in what was measured: workers that start don't help yet.
    """
    if measured_s is None or measured_s < 0.9 * limit_s:
        return []
    workers = memory.workers
    settled = not load.starting and load.ready >= workers and now_s - memory.changed_s >= settings.settle_s
    grow = measured_s > limit_s and settled
    why = f"{name.upper()} is {measured_s:.3f} s, its objective {limit_s:.3f} s"
    return [Signal(name, workers + 1 if grow else 0, workers + grow, why)]


def _need(signals: list[Signal]) -> _Need:
    most = max(signals, key=lambda signal: signal.up)
    low = ceil(most.up - EPSILON)
    high = max(low, *(ceil(signal.keep - EPSILON) for signal in signals))
    return _Need(low, high, most.reason, most.why)


def _in_band(prefill: _Need, decode: _Need, ratio: tuple[float, float] | None) -> tuple[_Need, _Need]:
    """Raise the pool that would be too small beside the other one; what is needed is never cut."""
    if ratio is None:
        return prefill, decode
    least, most = ratio
    why = f"{least:g} to {most:g} prefill workers for each decode worker"
    for_decode, for_prefill = ceil(decode.low * least - EPSILON), ceil(prefill.low / most - EPSILON)
    if for_decode > prefill.low:
        return _Need(for_decode, max(prefill.high, for_decode), "ratio", why), decode
    if for_prefill > decode.low:
        return prefill, _Need(for_prefill, max(decode.high, for_prefill), "ratio", why)
    return prefill, decode


def _bounded(need: _Need, bounds: PoolBounds, *, asleep: bool) -> _Need:
    if asleep:
        return _Need(bounds.least, bounds.least, "idle", "nothing to do")
    least = max(1, bounds.least)  # zero only after a long time without any work
    low, high = (min(max(figure, least), bounds.most) for figure in (need.low, need.high))
    if need.low > bounds.most:
        return _Need(low, high, "maximum", f"{need.why}, which asks for {need.low}")
    if need.low < least:
        return _Need(low, high, "minimum", need.why)
    return _Need(low, high, need.reason, need.why)


def _spare(need: _Need, load: PoolLoad) -> int:
    """Ready workers that the pool could do without for a moment."""
    return max(0, load.ready - need.low)


def _step(
    need: _Need,
    load: PoolLoad,
    memory: PoolMemory,
    now_s: float,
    settings: ScalingSettings,
    spare: int,
    *,
    asleep: bool,
) -> PoolAnswer:
    """From the present number towards what is needed: up fast, down slowly."""
    workers = memory.workers
    if need.low > workers:
        if workers == 0:
            return PoolAnswer(need.low, "waking", need.why)
        since = now_s if memory.short_since_s is None else memory.short_since_s
        if need.low - workers <= spare and now_s - since < settings.borrow_s:
            return PoolAnswer(workers, "borrowing", need.why)
        return PoolAnswer(need.low, need.reason, need.why)
    if need.high >= workers:
        held = need.reason in ("maximum", "minimum", "waits_for_decode") and workers == need.low
        return PoolAnswer(workers, need.reason if held else "steady", need.why)
    if load.draining:
        return PoolAnswer(workers, "draining", need.why)
    if asleep:
        return PoolAnswer(need.high, "idle", need.why)
    since = now_s if memory.over_since_s is None else memory.over_since_s
    if now_s - since < memory.patience_s:
        return PoolAnswer(workers, "cooling", need.why)
    smaller = workers - max(1, workers // 4)
    return PoolAnswer(max(smaller, memory.peak, need.high), "shrinking", need.why)


_Claim = tuple[_Need, PoolLoad, PoolAnswer]


def _within_budget(prefill: _Claim, decode: _Claim, settings: ScalingSettings) -> tuple[PoolAnswer, PoolAnswer]:
    """Give the GPUs to the pool that has least of what it needs, worker by worker."""
    claims = (prefill, decode)
    each = (settings.prefill.gpus, settings.decode.gpus)
    wanted = [answer.workers for _, _, answer in claims]
    budget = settings.budget_gpus
    if budget is None or sum(w * gpus for w, gpus in zip(wanted, each, strict=True)) <= budget:
        return prefill[2], decode[2]
    given = [_floor(claims[0], settings.prefill), _floor(claims[1], settings.decode)]
    while open_ := [
        i for i in (0, 1) if given[i] < wanted[i] and given[0] * each[0] + given[1] * each[1] + each[i] <= budget
    ]:
        given[min(open_, key=lambda i: given[i] / max(1, claims[i][0].low))] += 1
    first, second = (
        answer if workers == answer.workers else replace(answer, workers=workers, reason="budget")
        for workers, (_, _, answer) in zip(given, claims, strict=True)
    )
    return first, second


def _floor(claim: _Claim, bounds: PoolBounds) -> int:
    """What a pool keeps whatever the other one needs: its minimum, and everything while workers still leave it."""
    _, load, answer = claim
    return min(answer.workers, max(load.workers if load.draining else 0, bounds.least))


def _remember(
    answer: PoolAnswer, need: _Need, load: PoolLoad, memory: PoolMemory, now_s: float, settings: ScalingSettings
) -> PoolMemory:
    before, now = memory.workers, answer.workers
    short = need.low > now
    over = need.high < now
    kept = memory.over_since_s is not None and now == before
    memory = replace(
        memory,
        workers=now,
        short_since_s=(now_s if memory.short_since_s is None else memory.short_since_s) if short else None,
        over_since_s=(memory.over_since_s if kept else now_s) if over else None,
        peak=max(need.high, memory.peak if kept else 0) if over else 0,
    )
    if now == before:
        return memory
    patience_s = memory.patience_s
    quiet_s = now_s - memory.changed_s
    if now < before:
        if quiet_s > 2 * FLAP * patience_s:
            patience_s = settings.shrink_after_s
        return replace(memory, patience_s=patience_s, changed_s=now_s, shrunk_s=now_s)
    if memory.shrunk_s is not None and now_s - memory.shrunk_s < FLAP * patience_s:
        patience_s = min(2 * patience_s, LONGEST_PATIENCE_S)
    return replace(memory, patience_s=patience_s, changed_s=now_s)
