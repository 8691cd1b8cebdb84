"""How many workers: tables of causes and answers."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from runtime.policy.demand import DemandSettings, PoolLoad
from runtime.policy.objectives import PRESETS
from runtime.policy.scaling import scale
from runtime.policy.scaling_records import (
    REASONS,
    Answer,
    FleetLoad,
    Memory,
    PoolBounds,
    PoolMemory,
    ScalingSettings,
)
from runtime.policy.types import Cost

READ = Cost(0.0, 1e-4)  # 10,000 tokens a second
STEP = Cost(0.01, 0.001)  # 90 streams a worker within 0.1 s, 900 tokens a second

SETTINGS = ScalingSettings(PoolBounds(1, 10), PoolBounds(1, 10), borrow_s=0.0)
PREFILL = PoolLoad(ready=2, read=READ, arriving_tokens_s=13_000)
DECODE = PoolLoad(ready=2, read=READ, step=STEP, max_streams=256, tokens_s=1200, streams=60)


def answer(
    prefill: PoolLoad = PREFILL,
    decode: PoolLoad = DECODE,
    settings: ScalingSettings = SETTINGS,
    *,
    at_s: float = 1000.0,
    **fleet: float,
) -> Answer:
    """One decision that is the first one for long: the last change was at 0 s."""
    memory = Memory(*(PoolMemory(pool.workers, settings.shrink_after_s, 0.0) for pool in (prefill, decode)))
    return scale(FleetLoad(at_s, prefill, decode, **fleet), settings, memory)[0]  # type: ignore[arg-type]


def test_a_load_that_fits_changes_nothing() -> None:
    """Both pools busy for 65% of their time: enough, and not too much."""
    given = answer()
    assert (given.prefill.workers, given.prefill.reason) == (2, "steady")
    assert (given.decode.workers, given.decode.reason) == (2, "steady")


@pytest.mark.parametrize(
    ("changes", "workers", "reason"),
    [
        ({"arriving_tokens_s": 40_000}, 5, "arrivals"),  # 4 workers' work, at most 85% busy
        ({"queued_tokens": 500_000}, 7, "backlog"),  # 1.3 arriving and 50 s of work to clear in 10 s
        ({"arriving_tokens_s": 400_000}, 10, "maximum"),
        ({"lent_tokens_s": 27_000}, 5, "arrivals"),  # what decode workers read for it is its own need
        ({"kv_use": 0.95}, 3, "kv_guard"),
        ({"kv_use": 0.95, "pinned_kv": 0.6}, 2, "steady"),  # held for decode to pull: not prefill's fault
        ({"read": None, "queued_requests": 30}, 6, "queue_depth"),  # unmeasured: the simple rule
        ({"arriving_tokens_s": 20_000, "ready": 1, "starting": 2}, 3, "steady"),  # those that start are counted
    ],
)
def test_prefill_grows_for_its_own_work(changes: dict[str, object], workers: int, reason: str) -> None:
    """Seconds of queued and arriving uncached tokens decide, and decode does not move."""
    given = answer(prefill=replace(PREFILL, **changes))  # type: ignore[arg-type]
    assert (given.prefill.workers, given.prefill.reason) == (workers, reason)
    assert (given.decode.workers, given.decode.reason) == (2, "steady")


@pytest.mark.parametrize(
    ("changes", "workers", "reason"),
    [
        ({"tokens_s": 3000}, 4, "tokens"),
        ({"streams": 300}, 4, "streams"),
        ({"streams": 150, "queued_requests": 200}, 4, "streams"),
        ({"kv_use": 0.9}, 3, "kv_guard"),
        ({"lent_tokens_s": 2000}, 5, "tokens"),  # what prefill workers write for it
        ({"step": None, "max_streams": None, "queued_requests": 30}, 6, "queue_depth"),
        ({"tokens_s": 30_000}, 10, "maximum"),
    ],
)
def test_decode_grows_for_its_own_work(changes: dict[str, object], workers: int, reason: str) -> None:
    """Tokens a second, places and KV blocks decide, and prefill does not move."""
    given = answer(decode=replace(DECODE, **changes))  # type: ignore[arg-type]
    assert (given.decode.workers, given.decode.reason) == (workers, reason)
    assert (given.prefill.workers, given.prefill.reason) == (2, "steady")


def test_prefill_waits_for_decode() -> None:
    """Prompts queue because decode does not pull what is read: decode grows, prefill does not."""
    prefill = replace(PREFILL, queued_tokens=500_000, kv_use=0.95, pinned_kv=0.8)
    given = answer(prefill, replace(DECODE, streams=300))
    assert (given.prefill.workers, given.prefill.reason) == (2, "waits_for_decode")
    assert (given.decode.workers, given.decode.reason) == (4, "streams")


@pytest.mark.parametrize(
    ("fleet", "prefill", "decode", "grown"),
    [
        ({"ttft_s": 3.0}, PREFILL, DECODE, "prefill"),
        ({"itl_s": 0.15}, PREFILL, DECODE, "decode"),
        ({"ttft_s": 3.0}, replace(PREFILL, arriving_tokens_s=9000), DECODE, ""),  # a long prompt, not a queue
        ({"itl_s": 0.15}, replace(PREFILL, lent_tokens_s=100), replace(DECODE, arriving_tokens_s=100), ""),
        ({"ttft_s": 3.0}, replace(PREFILL, ready=1, starting=1), DECODE, ""),  # first see what those bring
        ({"ttft_s": 1.9, "itl_s": 0.095}, PREFILL, DECODE, ""),
    ],
)
def test_latencies_trim_the_pool_at_fault(
    fleet: dict[str, float], prefill: PoolLoad, decode: PoolLoad, grown: str
) -> None:
    """A missed objective gives one worker to the pool that caused it, and only once the last change shows."""
    given = answer(prefill, decode, **fleet)
    assert given.prefill.workers == (3 if grown == "prefill" else 2)
    assert given.decode.workers == (3 if grown == "decode" else 2)
    just_changed = answer(prefill, decode, at_s=30.0, **fleet)
    assert (just_changed.prefill.workers, just_changed.decode.workers) == (2, 2)


def test_objectives_come_from_presets() -> None:
    """A tighter objective leaves fewer places on a worker, so that more workers are needed."""
    interactive = replace(SETTINGS, demand=DemandSettings(objectives=PRESETS["8b-interactive"]))
    assert answer(settings=interactive).decode.workers > answer().decode.workers
    assert all(preset.ttft_s > preset.itl_s for preset in PRESETS.values())


@pytest.mark.parametrize(("queued", "workers"), [(0, 2), (10, 2), (11, 3), (49, 10), (500, 10)])
def test_the_simple_rule(queued: int, workers: int) -> None:
    """Queue depth over 5, 1 to 10 workers: what people copy from blogs."""
    settings = replace(SETTINGS, demand=DemandSettings(rule="queue_depth"))
    prefill = replace(PREFILL, queued_requests=queued, queued_tokens=queued * 1000)
    assert answer(prefill, settings=settings).prefill.workers == workers


def test_the_ratio_keeps_its_band() -> None:
    """Growing decode takes prefill along, and never cuts what is needed."""
    settings = replace(SETTINGS, ratio=(1.0, 2.0))
    given = answer(decode=replace(DECODE, tokens_s=3000), settings=settings)
    assert (given.prefill.workers, given.prefill.reason) == (4, "ratio")
    given = answer(prefill=replace(PREFILL, arriving_tokens_s=80_000), settings=settings)
    assert (given.prefill.workers, given.decode.workers) == (10, 5)
    assert answer(settings=replace(SETTINGS, ratio=(0.0, inf))) == answer()


def test_the_budget_goes_to_the_greater_need() -> None:
    """Ten GPUs: each pool gets its part of them, and one with a worker to spare gives it."""
    bounds = PoolBounds(1, 10, gpus=1)
    settings = replace(SETTINGS, prefill=bounds, decode=bounds, budget_gpus=10)
    given = answer(replace(PREFILL, arriving_tokens_s=80_000), replace(DECODE, tokens_s=8000), settings)
    assert (given.prefill.workers, given.decode.workers) == (5, 5)
    assert {given.prefill.reason, given.decode.reason} == {"budget"}
    given = answer(replace(PREFILL, arriving_tokens_s=80_000), replace(DECODE, ready=4), settings)
    assert given.prefill.workers + given.decode.workers == 10
    assert given.decode.workers == 2
    two = replace(settings, decode=PoolBounds(1, 10, gpus=2), budget_gpus=5)
    given = answer(replace(PREFILL, arriving_tokens_s=80_000), replace(DECODE, ready=1, tokens_s=8000), two)
    assert given.prefill.workers + 2 * given.decode.workers == 5


def test_borrowing_comes_first() -> None:
    """While the other pool has a worker to spare, growth waits; what it can't cover does not."""
    settings = replace(SETTINGS, borrow_s=5.0)
    load = FleetLoad(0.0, replace(PREFILL, arriving_tokens_s=20_000), replace(DECODE, ready=4))
    given, memory = scale(load, settings, None)
    assert (given.prefill.workers, given.prefill.reason) == (2, "borrowing")
    given, memory = scale(replace(load, at_s=4.0), settings, memory)
    assert given.prefill.reason == "borrowing"
    given, _ = scale(replace(load, at_s=5.0), settings, memory)
    assert (given.prefill.workers, given.prefill.reason) == (3, "arrivals")
    busy = replace(load, decode=replace(DECODE, tokens_s=1600))
    assert scale(busy, settings, None)[0].prefill.workers == 3
    flood = replace(load, prefill=replace(PREFILL, arriving_tokens_s=60_000))
    assert scale(flood, settings, None)[0].prefill.workers == 8


def test_up_at_once_and_down_slowly() -> None:
    """A quarter at a time, each only after the load has been small for all of `shrink_after_s`."""
    big = FleetLoad(0.0, replace(PREFILL, ready=8), replace(DECODE, ready=2))
    counts, memory = [], None
    for second in range(0, 700, 10):
        given, memory = scale(replace(big, at_s=float(second)), SETTINGS, memory)
        counts.append(given.prefill.workers)
        big = replace(big, prefill=replace(big.prefill, ready=given.prefill.workers))
    assert counts[:12] == [8] * 12
    assert sorted(set(counts), reverse=True) == [8, 6, 5, 4, 3]
    assert all(counts.count(size) == 12 for size in (8, 6, 5, 4))


def test_a_blip_starts_the_wait_again() -> None:
    """What was needed at most since the load fell is what the pool shrinks to."""
    small = FleetLoad(0.0, replace(PREFILL, ready=8), DECODE)
    _, memory = scale(small, SETTINGS, None)
    blip = replace(small, at_s=60.0, prefill=replace(small.prefill, arriving_tokens_s=42_000))
    _, memory = scale(blip, SETTINGS, memory)
    given, _ = scale(replace(small, at_s=121.0), SETTINGS, memory)
    assert given.prefill.workers == 7


def test_a_pool_that_shrank_too_early_waits_longer() -> None:
    """Growing again soon after shrinking doubles the patience."""
    load, memory = FleetLoad(0.0, replace(PREFILL, ready=4, arriving_tokens_s=6000), DECODE), None
    for second in (0.0, 120.0):
        given, memory = scale(replace(load, at_s=second), SETTINGS, memory)
    assert given.prefill.workers == 3
    back = replace(load, at_s=200.0, prefill=replace(load.prefill, ready=3, arriving_tokens_s=30_000))
    given, memory = scale(back, SETTINGS, memory)
    assert given.prefill.workers == 4
    assert memory is not None
    assert memory.prefill.patience_s == 240.0


def test_nothing_shrinks_while_workers_drain() -> None:
    """One wave at a time: what drains has not given its KV and its streams away yet."""
    load, memory = FleetLoad(0.0, replace(PREFILL, ready=8, draining=2), DECODE), None
    for second in range(0, 1000, 10):
        given, memory = scale(replace(load, at_s=float(second)), SETTINGS, memory)
        assert given.prefill.workers == 8
    assert given.prefill.reason == "draining"


def test_to_zero_and_back() -> None:
    """Both pools sleep after a long time without any work, and wake for the first request that waits."""
    settings = replace(SETTINGS, prefill=PoolBounds(0, 4), decode=PoolBounds(0, 4))
    empty = PoolLoad(ready=1, read=READ, step=STEP, max_streams=256)
    load, memory = FleetLoad(0.0, empty, empty), None
    for second in (0.0, 299.0):
        given, memory = scale(replace(load, at_s=second), settings, memory)
        assert (given.prefill.workers, given.decode.workers) == (1, 1)
    given, memory = scale(replace(load, at_s=300.0), settings, memory)
    assert (given.prefill.workers, given.decode.workers) == (0, 0)
    assert given.prefill.reason == "idle"
    gone = FleetLoad(310.0, PoolLoad(), PoolLoad())
    given, memory = scale(gone, settings, memory)
    assert (given.prefill.workers, given.decode.workers) == (0, 0)
    assert scale(gone, settings, None)[0] == given  # the memory may get lost
    given, _ = scale(replace(gone, at_s=320.0, waiting=1), settings, memory)
    assert (given.prefill.workers, given.decode.workers) == (1, 1)
    assert given.decode.reason == "waking"


def test_a_little_work_is_not_nothing() -> None:
    """A pool keeps a worker while there is any work, however long."""
    settings = replace(SETTINGS, prefill=PoolBounds(0, 4), decode=PoolBounds(0, 4))
    load, memory = FleetLoad(0.0, replace(PREFILL, ready=1, arriving_tokens_s=1.0), PoolLoad(ready=1)), None
    for second in range(0, 4000, 100):
        given, memory = scale(replace(load, at_s=float(second)), settings, memory)
    assert (given.prefill.workers, given.decode.workers) == (1, 1)


def test_every_reason_is_documented() -> None:
    """The labels are a closed set with words for each."""
    assert all(REASONS.values())
    assert answer().prefill.reason in REASONS
