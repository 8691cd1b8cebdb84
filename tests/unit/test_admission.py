"""Who may begin, in which order, and how long the others have to wait."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.policy.admission import (
    CLASSES,
    AdmissionPolicy,
    Ahead,
    Pace,
    blocked,
    level_of,
    predicted_wait_s,
)
from runtime.policy.fair_queue import Claim, FairQueue
from runtime.policy.types import Cost, Disaggregated, Local, Plan, Snapshot, WorkerView

HIGH, NORMAL, LOW = range(3)
POLICY = AdmissionPolicy()  # 0.5 s at each engine


def worker(name: str, **figures: Any) -> WorkerView:
    """A measured worker that reads 1,000 tokens a second; idle, but for `figures`."""
    known: dict[str, Any] = {"queued_tokens": 0, "prefill": Cost(0.0, 0.001), "max_streams": 8}
    return WorkerView(name, figures.pop("requests", 0), figures.pop("tokens", 0), **{**known, **figures})


def unmeasured(name: str, requests: int = 0, tokens: int = 0) -> WorkerView:
    return WorkerView(name, requests, tokens)


PAIR, WHOLE, BORROWED = Disaggregated("p1", "d1"), Local("d1", "r"), Local("p1", "r")
IDLE = (worker("p1"),), (worker("d1"),)
BEHIND, NOT_QUITE = {"queued_tokens": 500, "queued_requests": 2}, {"queued_tokens": 499, "queued_requests": 9}

ONE_LONG = {"queued_tokens": 90_000, "queued_requests": 1}

BLOCKED: list[tuple[str, Plan, tuple[tuple[WorkerView, ...], tuple[WorkerView, ...]], str]] = [
    ("nothing to do", PAIR, IDLE, ""),
    ("less to read than an engine gets", PAIR, ((worker("p1", **NOT_QUITE),), IDLE[1]), ""),
    ("as much as an engine gets", PAIR, ((worker("p1", **BEHIND),), IDLE[1]), "prefill"),
    ("the plan follows its cache past an idle worker", PAIR, ((worker("p1", **BEHIND), worker("p2")), IDLE[1]), ""),
    ("one prompt, however long: the next one is to be there", PAIR, ((worker("p1", **ONE_LONG),), IDLE[1]), ""),
    ("all of the pool are behind", PAIR, ((worker("p1", **BEHIND), worker("p2", **BEHIND)), IDLE[1]), "prefill"),
    ("a whole request does not need prefill", WHOLE, ((worker("p1", **BEHIND),), IDLE[1]), ""),
    ("a decode worker with prompts to read", WHOLE, (IDLE[0], (worker("d1", **BEHIND),)), "prefill"),
    ("which does not hold up streams from elsewhere", PAIR, (IDLE[0], (worker("d1", **BEHIND),)), ""),
    ("no place among the streams", PAIR, (IDLE[0], (worker("d1", streams=8),)), "decode"),
    ("the last place", PAIR, (IDLE[0], (worker("d1", streams=7),)), ""),
    ("no blocks", PAIR, (IDLE[0], (worker("d1", streams=1, free_blocks=5),)), "decode"),
    ("no blocks, and nobody who will give any", PAIR, (IDLE[0], (worker("d1", free_blocks=5),)), ""),
    ("no blocks to read into", PAIR, ((worker("p1", free_blocks=5, requests=1),), IDLE[1]), "prefill"),
    ("a borrowed worker without a place", BORROWED, ((worker("p1", streams=8),), ()), "decode"),
    ("without figures: tokens", PAIR, ((unmeasured("p1", 2, 2047),), IDLE[1]), ""),
    ("without figures: too many tokens", PAIR, ((unmeasured("p1", 2, 2048),), IDLE[1]), "prefill"),
    ("without figures: requests", PAIR, (IDLE[0], (unmeasured("d1", 255),)), ""),
    ("without figures: too many requests", PAIR, (IDLE[0], (unmeasured("d1", 256),)), "decode"),
    ("a worker that is gone meanwhile", Disaggregated("p9", "d9"), IDLE, ""),
]


@pytest.mark.parametrize(("plan", "pools", "pool"), [c[1:] for c in BLOCKED], ids=[c[0] for c in BLOCKED])
def test_who_has_to_catch_up(plan: Plan, pools: Any, pool: str) -> None:
    """A prompt of 100 tokens waits for the pool that has enough to do, and for no other."""
    assert blocked(plan, 100, Snapshot(*pools), POLICY) == pool


@pytest.mark.parametrize(("priority", "name"), [(-7, "high"), (-1, "high"), (0, "normal"), (1, "low"), (99, "low")])
def test_priority_as_vllm_has_it(priority: int, name: str) -> None:
    """Lower goes first."""
    assert CLASSES[level_of(priority)] == name


# The order


def claim(number: int, **what: Any) -> Claim:
    """A claim of 100 tokens, arrived as many seconds after 0 as its number says."""
    return Claim(
        **{"level": NORMAL, "tenant": "", "tokens": 100, "requests": 1, "arrived": number, **what}, number=number
    )


ORDER: list[tuple[str, list[Claim], float, list[int]]] = [
    ("first come, first served", [claim(1), claim(2), claim(3)], 3, [1, 2, 3]),
    ("the better class", [claim(1, level=LOW), claim(2), claim(3, level=HIGH)], 3, [3, 2, 1]),
    ("the shorter prompt", [claim(1, tokens=3000), claim(2), claim(3)], 3, [2, 3, 1]),
    ("not those that come after the handicap", [claim(1, tokens=3000), claim(2), claim(5)], 5, [2, 1, 5]),
    ("a handicap has an end", [claim(1, tokens=10**6), claim(12)], 12, [1, 12]),
    ("ageing: up by one class", [claim(1), claim(12, level=HIGH)], 12, [1, 12]),
    ("ageing: by two", [claim(1, level=LOW), claim(22, level=HIGH)], 22, [1, 22]),
    ("ageing: not yet", [claim(1, level=LOW), claim(20, level=HIGH)], 20, [20, 1]),
]


def drain(queue: FairQueue, now: float) -> list[Claim]:
    """Take everybody in order."""
    taken = []
    while queue:
        taken.append(queue.in_order(now, 4)[0])
        queue.take(taken[-1])
    return taken


@pytest.mark.parametrize(("claims", "now", "order"), [c[1:] for c in ORDER], ids=[c[0] for c in ORDER])
def test_order(claims: list[Claim], now: float, order: list[int]) -> None:
    """Of one tenant; a class is ten seconds, 1,000 tokens are one."""
    queue = FairQueue(POLICY)
    for each in claims:
        queue.add(each)
    assert [c.number for c in drain(queue, now)] == order


def test_a_newcomer_does_not_wait_for_a_flood() -> None:
    """One tenant has a hundred requests waiting: the first one of another is next, the second one the one after."""
    queue = FairQueue(POLICY)
    for number in range(100):
        queue.add(claim(number, tenant="flood", arrived=0))
    queue.take(queue.in_order(0, 1)[0])
    for number in (100, 101):
        queue.add(claim(number, tenant="other", arrived=1))
    order = [c.number for c in drain(queue, 1)]
    assert order.index(100) <= 1
    assert order.index(101) <= 3


def test_who_comes_late_does_not_catch_up() -> None:
    """A tenant gets its share from when it comes, not what the others had before."""
    queue = FairQueue(POLICY)
    for number in range(60):
        queue.add(claim(number, tenant="early", arrived=0))
    for _ in range(40):
        queue.take(queue.in_order(0, 1)[0])
    for number in range(60, 70):
        queue.add(claim(number, tenant="late", arrived=1))
    order = [c.tenant for c in drain(queue, 1)][:20]
    assert 9 <= order.count("early") <= 11


def test_answers_count() -> None:
    """Who gets long answers gets fewer of them."""
    queue = FairQueue(POLICY)
    for number in range(100):
        queue.add(claim(number, tenant="ab"[number % 2], arrived=0))
    first = []
    for _ in range(30):
        taken = queue.in_order(0, 1)[0]
        queue.take(taken)
        queue.charge(taken.tenant, 200 if taken.tenant == "a" else 0)
        first.append(taken.tenant)
    assert abs(Counter(first)["b"] - 3 * Counter(first)["a"]) <= 3


def test_history_ends_with_the_queue() -> None:
    """What a tenant had while nobody else waited is not held against it later."""
    queue = FairQueue(POLICY)
    for number in range(10):
        queue.add(claim(number, tenant="a"))
    drain(queue, 10)
    queue.add(claim(11, tenant="a"))
    queue.add(claim(12, tenant="b"))
    queue.add(claim(13, tenant="a"))
    queue.add(claim(14, tenant="b"))
    assert [c.tenant for c in drain(queue, 14)] in (["a", "b", "a", "b"], ["a", "b", "b", "a"])


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=50),
)
@settings(deadline=None)
def test_fair_shares_converge(weights: list[float], sizes: list[int]) -> None:
    """While all wait, nobody is further from its share of the tokens than two of the longest prompts a tenant."""
    names = [f"t{i}" for i in range(len(weights))]
    queue = FairQueue(replace(POLICY, weights=dict(zip(names, weights, strict=True))))
    number = 0

    def refill(name: str) -> None:
        nonlocal number
        number += 1
        queue.add(claim(number, tenant=name, tokens=sizes[number % len(sizes)], arrived=0.0))

    for name in names:
        refill(name)
        refill(name)
    had: Counter[str] = Counter()
    for _ in range(200):
        taken = queue.in_order(0.0, 1)[0]
        refill(taken.tenant)
        queue.take(taken)
        had[taken.tenant] += taken.tokens
    shares = [had[name] / weight for name, weight in zip(names, weights, strict=True)]
    assert max(shares) - min(shares) <= 2 * max(sizes) / min(weights)


CLAIMS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from("abcd"), st.integers(1, 5000), st.integers(1, 4)), max_size=60
)


@given(claims=CLAIMS, requests=st.integers(0, 20), tokens=st.integers(0, 20_000))
@settings(deadline=None)
def test_never_more_than_the_bounds(claims: list[Any], requests: int, tokens: int) -> None:
    """What waits stays within both bounds, nobody is lost, and who is put out is never better than who stays."""
    queue = FairQueue(replace(POLICY, max_waiting_requests=requests, max_waiting_tokens=tokens))
    out: list[Claim] = []
    inside: dict[int, Claim] = {}
    for number, (level, tenant, size, count) in enumerate(claims):
        new = claim(number, level=level, tenant=tenant, tokens=size, requests=count)
        queue.add(new)
        inside[number] = new
        victims = queue.overflow()
        for victim in victims:
            del inside[victim.number]
            assert all(victim.level >= other.level for other in inside.values())
        out += victims
        waiting = [queue.waiting(level) for level in range(3)]
        assert sum(w[0] for w in waiting) == sum(c.requests for c in inside.values()) <= requests
        assert sum(w[1] for w in waiting) == sum(c.tokens for c in inside.values()) <= tokens
    assert len(queue) == len(inside)
    assert len(out) + len(inside) == len(claims)


def test_a_flood_does_not_put_out_others() -> None:
    """A full room: the newest of the tenant with most waiting has to go, whoever comes."""
    queue = FairQueue(replace(POLICY, max_waiting_requests=10))
    for number in range(10):
        queue.add(claim(number, tenant="flood"))
    queue.add(claim(10, tenant="other"))
    assert [c.number for c in queue.overflow()] == [9]
    queue.add(claim(11, tenant="flood"))
    assert [c.number for c in queue.overflow()] == [11]
    queue.add(claim(12, tenant="flood", level=HIGH))
    assert [c.number for c in queue.overflow()] == [8]


@given(
    arrivals=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.integers(1, 3000)), min_size=1),
    level=st.integers(0, 2),
    tokens=st.integers(1, 100_000),
)
@settings(deadline=None, max_examples=50)
def test_nobody_waits_for_ever(arrivals: list[tuple[int, str, int]], level: int, tokens: int) -> None:
    """However the others come, twice as fast as they are let in: a request gets its turn within a bound."""
    queue = FairQueue(POLICY)
    waiting = claim(0, level=level, tenant="a", tokens=tokens, arrived=0.0)
    queue.add(waiting)
    number = 0
    # Each second one is let in and two come. Two classes up take 20 s, the handicap at most 10; what came by then of
    # its own tenant, and as much of the two others, may still be before it.
    for now in range(400):
        for _ in range(2):
            number += 1
            other_level, tenant, size = arrivals[number % len(arrivals)]
            queue.add(claim(number, level=other_level, tenant=tenant, tokens=size, arrived=float(now)))
        taken = queue.in_order(float(now), 1)[0]
        queue.take(taken)
        if taken.number == 0:
            return
    raise AssertionError("it still waits")


@given(claims=CLAIMS, newcomer=st.tuples(st.integers(0, 2), st.sampled_from("abcd"), st.integers(1, 5000)))
@settings(deadline=None)
def test_what_is_ahead(claims: list[Any], newcomer: tuple[int, str, int]) -> None:
    """Never more than what waits, nothing of worse classes, and all of better ones."""
    queue = FairQueue(POLICY)
    for number, (level, tenant, size, count) in enumerate(claims):
        queue.add(claim(number, level=level, tenant=tenant, tokens=size, requests=count, arrived=0.0))
    level, tenant, size = newcomer
    ahead = queue.ahead(claim(1000, level=level, tenant=tenant, tokens=size, arrived=0.0))
    better = sum(queue.waiting(other)[1] for other in range(level))
    assert better <= ahead.tokens <= better + queue.waiting(level)[1] + 1e-6


# How long


def test_the_wait_from_what_workers_tell() -> None:
    """Before a pace is known: the least backlog, and what is ahead at the speed of the whole pool."""
    snapshot = Snapshot((worker("p1", queued_tokens=800), worker("p2", queued_tokens=600)), (worker("d1"),))
    assert predicted_wait_s(Ahead(4000, 4), snapshot, Pace()) == pytest.approx(0.6 + 4000 * 0.001 / 2)
    assert predicted_wait_s(Ahead(4000, 4), Snapshot((), ()), Pace()) == 0.0


def test_the_wait_at_workers_without_figures() -> None:
    """What this front end sent them is work ahead, at the pace seen."""
    pace = Pace()
    pace.begin(0.0)
    for tenth in range(1, 50):
        pace.note(tenth / 10, 100, 1)
    snapshot = Snapshot((unmeasured("p1", 3, 2000), unmeasured("p2", 3, 2000)), (unmeasured("d1"),))
    assert predicted_wait_s(Ahead(1000, 1), snapshot, pace) == pytest.approx(5.0)
    measured = Snapshot((worker("p1", queued_tokens=300),), (worker("d1"),))
    assert predicted_wait_s(Ahead(1000, 1), measured, pace) == pytest.approx(1.3)


def test_the_wait_from_the_pace() -> None:
    """Ten requests of 100 tokens were let in each second: a hundred ahead take ten seconds, however long they are."""
    pace = Pace()
    pace.begin(0.0)
    assert pace.seconds(Ahead(100, 1)) is None
    for tenth in range(1, 50):
        pace.note(tenth / 10, 100, 1)
    assert pace.seconds(Ahead(1000, 100)) == pytest.approx(10.0)
    assert pace.seconds(Ahead(50_000, 10)) == pytest.approx(50.0)


def test_a_hang_is_no_pace() -> None:
    """Short prompts that are let in after all the seconds of a hang do not have everybody behind them refused."""
    fast = Snapshot((worker("p1"),), (worker("d1"),))
    pace = Pace()
    pace.begin(0.0)
    pace.note(14.0, 4, 1)
    assert predicted_wait_s(Ahead(2000, 5), fast, pace) == pytest.approx(2.0)  # at the speed that workers tell
    for tenth in range(1, 100):
        pace.note(14 + tenth / 10, 100, 1)
    before = predicted_wait_s(Ahead(2000, 5), fast, pace)
    pace.note(38.0, 4, 1)
    assert predicted_wait_s(Ahead(2000, 5), fast, pace) < 4 * before


def test_a_slow_pace_is_believed() -> None:
    """One request in ten seconds for a while is what it will be: it is not forgotten between two of them."""
    pace = Pace()
    pace.begin(0.0)
    for tens in range(1, 30):
        pace.note(tens * 10.0, 100, 1)
    assert pace.seconds(Ahead(0, 5)) == pytest.approx(50.0)


def test_the_pace_follows() -> None:
    """Twice as slow for a minute: it is believed. Time without a queue is not counted."""
    pace = Pace()
    pace.begin(0.0)
    for tenth in range(1, 100):
        pace.note(tenth / 10, 100, 1)
    pace.begin(1000.0)
    for fifth in range(1, 300):
        pace.note(1000 + fifth / 5, 100, 1)
    assert pace.seconds(Ahead(0, 5)) == pytest.approx(1.0, rel=0.05)
