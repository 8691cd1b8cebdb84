"""Requests wait at the front end until an engine may have them: in order, within bounds, and not for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import REGISTRY

from runtime import waiting_room
from runtime.errors import Refusal
from runtime.policy.admission import AdmissionPolicy
from runtime.policy.routing import route
from runtime.policy.types import Cost, RequestView, RoutingSettings, Snapshot, WorkerView
from runtime.visit import Visit
from runtime.waiting_room import Look, WaitingRoom

HIGH, NORMAL, LOW = range(3)


@dataclass
class House:
    """A waiting room in front of one worker of each pool, which holds what `run` gives it until `finish`."""

    places: int = 1
    workers: bool = True
    running: list[str] = field(default_factory=list)
    began: list[str] = field(default_factory=list)
    coming: bool = False
    looks: int = 0

    def build(self, wait_for_worker_s: float = 5.0, **policy: Any) -> None:
        """Open the room."""
        self.changed = asyncio.Event()
        settings = AdmissionPolicy(**{"max_wait_s": 100.0, **policy})
        self.room = WaitingRoom(settings, wait_for_worker_s, lambda: self.coming, lambda: self.changed)

    def look(self, view: RequestView) -> Look:
        """The plan by what runs now."""
        self.looks += 1
        cost, count = Cost(0.0, 0.001), len(self.running)
        decode = WorkerView("d", count, 0, 0, streams=count, max_streams=self.places, prefill=cost)
        prefill = WorkerView("p", 0, 0, 0, prefill=cost)
        snapshot = Snapshot((prefill,), (decode,)) if self.workers else Snapshot((), ())
        return Look(view, snapshot, route(view, snapshot, RoutingSettings(borrow=False)))

    async def run(self, name: str, tokens: int = 100, level: int = NORMAL, visit: Visit | None = None, **v: Any) -> str:
        """Begin when it may; says how it went."""
        view = RequestView(tokens)
        try:
            await self.room.enter(visit or Visit(**v), level, lambda: self.look(view))
        except Refusal as refusal:
            return refusal.reason
        self.running.append(name)
        self.began.append(name)
        return "began"

    def start(self, name: str, **what: Any) -> asyncio.Task[str]:
        """The same in the background."""
        return asyncio.ensure_future(self.run(name, **what))

    def finish(self) -> None:
        """The oldest running request ends."""
        self.running.pop(0)
        self.room.poke()

    async def settle(self) -> None:
        """Let everything happen that needs no time."""
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """A house whose room is empty at the end."""
    house = House()
    house.build()
    yield house
    assert not house.room._parties
    assert not house.room._queue


async def test_nobody_waits_nobody_is_held_up(house: House) -> None:
    """With room, a request begins without a single suspension and with one look, and the room does nothing."""
    coroutine = house.run("a")
    with pytest.raises(StopIteration, match="began"):
        coroutine.send(None)
    assert house.looks == 1
    assert house.room._keeper is None


async def test_order(house: House) -> None:
    """One place: the better class first, then the shorter prompt, then who came first."""
    await house.run("first")
    waiting = [
        house.start("low", level=LOW),
        house.start("long", tokens=5000),
        house.start("normal"),
        house.start("next"),
        house.start("high", level=HIGH),
    ]
    await house.settle()
    assert house.began == ["first"]
    while house.running:
        house.finish()
        await house.settle()
    assert house.began == ["first", "high", "normal", "next", "long", "low"]
    assert {task.result() for task in waiting} == {"began"}


async def test_one_place_lets_in_one(house: House) -> None:
    """Who is let in counts at once: a free place is not given away twice."""
    house.places = 2
    waiting = [house.start(str(number)) for number in range(10)]
    await house.settle()
    assert len(house.running) == 2
    for _ in range(8):
        house.finish()
        await house.settle()
        assert len(house.running) == 2
    assert [task.result() for task in waiting] == ["began"] * 10
    house.running.clear()


async def test_newcomers_do_not_pass_those_who_wait(house: House) -> None:
    """A place is free, and somebody waits for it: the queue is the way to it."""
    await house.run("a")
    waiting = house.start("b")
    await house.settle()
    house.running.clear()  # nobody poked the room yet
    late = house.start("c")
    await house.settle()
    assert house.began[1:2] != ["c"]
    house.running.clear()
    await waiting
    house.running.clear()
    house.room.poke()
    assert await late == "began"
    assert house.began == ["a", "b", "c"]


async def test_news_of_workers_is_noticed_unpoked(house: House) -> None:
    """What other front ends' requests free is noticed by looking."""
    await house.run("a")
    waiting = house.start("b")
    await house.settle()
    house.running.clear()
    assert await asyncio.wait_for(waiting, 5) == "began"


async def test_a_client_that_leaves_the_queue(house: House) -> None:
    """It is forgotten, and who comes after it takes its turn."""
    await house.run("a")
    gone, stays = house.start("gone"), house.start("stays")
    await house.settle()
    gone.cancel()
    await house.settle()
    house.finish()
    assert await stays == "began"
    assert house.began == ["a", "stays"]


@pytest.mark.parametrize("leaves", [0, 1, 2])
async def test_parts_of_one_response_are_let_in_together(house: House, leaves: int) -> None:
    """`n` choices wait as one; one that is cancelled does not take the others with it."""
    await house.run("a")
    visit = Visit()
    parts = [house.start(f"part {number}", visit=visit) for number in range(3)]
    other = house.start("other", tokens=1000)
    await house.settle()
    assert house.room._queue.waiting(NORMAL) == (4, 1300)
    parts[leaves].cancel()
    await house.settle()
    house.finish()
    await house.settle()
    assert len(house.running) == 2  # though there is place for one
    house.running.clear()
    house.room.poke()
    assert await other == "began"


async def test_parts_of_one_response_are_refused_together(house: House) -> None:
    """The third of `n` choices does not fit: none is let in."""
    house.build(max_waiting_requests=2)
    await house.run("a")
    before = refused("overloaded")
    visit = Visit()
    parts = [house.start(f"part {number}", visit=visit) for number in range(4)]
    await house.settle()
    assert [part.result() for part in parts] == ["overloaded"] * 4
    assert refused("overloaded") == before + 1
    assert visit.refusal is not None


def refused(reason: str) -> float:
    """How many requests were refused for this reason so far."""
    return REGISTRY.get_sample_value("baton_refusals_total", {"reason": reason}) or 0.0


async def test_the_bounds_hold(house: House) -> None:
    """What is too much is refused at once, with a time to come back."""
    house.build(max_waiting_requests=3, max_waiting_tokens=1000)
    await house.run("a")
    waiting = [house.start(str(number), tokens=300) for number in range(4)]
    big = Visit()
    too_big = house.start("big", tokens=900, visit=big)
    await house.settle()
    assert waiting[3].result() == too_big.result() == "overloaded"
    assert big.refusal is not None
    assert big.refusal.retry_after_s is not None
    assert house.room._queue.waiting(NORMAL) == (3, 900)
    for task in waiting:
        task.cancel()
    await house.settle()


async def test_retry_after_is_true(house: House) -> None:
    """Ten begin each second and may wait for 2 s: who is refused is told when those before it will have begun."""
    house.build(max_wait_s=2.0)
    await house.run("a")
    waiting = [house.start(f"first {number}") for number in range(10)]
    await house.settle()

    async def end_one_each_tenth() -> None:
        while True:
            await asyncio.sleep(0.1)
            if house.running:
                house.finish()

    engine = asyncio.ensure_future(end_one_each_tenth())
    await asyncio.gather(*waiting)
    waiting = [house.start(f"next {number}") for number in range(40)]
    await house.settle()
    outcome = [task.result() for task in waiting if task.done()]
    assert set(outcome) == {"overloaded"}
    assert 8 <= len(outcome) <= 32  # the first twenty or so fit into 2 s; a busy machine is slower at times
    last = Visit()
    assert await house.run("one more", visit=last) == "overloaded"
    assert last.refusal is not None
    told = last.refusal.retry_after_s or 0.0
    started = time.monotonic()
    await asyncio.gather(*waiting)
    took = time.monotonic() - started
    assert 0.5 * took <= told <= 2.0 * took
    assert await house.run("again") == "began"
    engine.cancel()


async def test_a_deadline_drops_what_nobody_waits_for(house: House) -> None:
    """It passes while the request waits: it never begins. And none begins whose deadline has passed already."""
    await house.run("a")
    waiting = house.start("late", deadline=time.monotonic() + 0.1)
    assert await asyncio.wait_for(waiting, 5) == "deadline"
    house.finish()
    assert await house.run("too late", deadline=time.monotonic() - 1) == "deadline"
    assert house.began == ["a"]


async def test_a_deadline_that_can_not_be_kept_is_told_at_once(house: House) -> None:
    """The work ahead takes longer than the client will wait: refused before it has waited for nothing."""
    await house.run("a")
    ahead = house.start("ahead", tokens=5000)  # five seconds
    await house.settle()
    assert await house.run("hurry", tokens=8000, deadline=time.monotonic() + 2) == "overloaded"
    assert not ahead.done()
    ahead.cancel()
    await house.settle()


async def test_nobody_is_left_waiting(house: House) -> None:
    """The engine stands still, and no prediction came true: twice the longest wait, and not more."""
    house.build(max_wait_s=0.2)
    await house.run("a")
    started = time.monotonic()
    assert await house.run("b") == "overloaded"
    assert 0.4 <= time.monotonic() - started < 2.0


@pytest.mark.parametrize("coming", [True, False])
async def test_no_worker(house: House, coming: bool) -> None:
    """Within the limit it waits for one; `starting` if one is on its way, else `no_workers`; and when to come back."""
    house.build(wait_for_worker_s=0.1)
    house.workers, house.coming = False, coming
    visit = Visit()
    assert await house.run("a", visit=visit) == ("starting" if coming else "no_workers")
    assert visit.refusal is not None
    assert (visit.refusal.retry_after_s or 0.0) > 0


async def test_a_start_lets_all_in(house: House) -> None:
    """Waiting for a start is not waiting in the queue: those who waited longer than the queue's limit begin, too."""
    house.build(max_wait_s=0.1, wait_for_worker_s=5.0)
    house.workers = False
    waiting = [house.start(str(number)) for number in range(10)]
    await asyncio.sleep(0.4)
    house.workers = True
    house.room.poke()
    await house.settle()
    assert [task.result() for task in waiting if task.done()] == ["began"]
    house.places = 100
    house.room.poke()
    assert await asyncio.gather(*waiting) == ["began"] * 10
    house.running.clear()


async def test_the_wait_for_a_start_has_its_own_limit(house: House) -> None:
    """More than that are told at once that the server is starting."""
    house.build(max_starting_requests=3)
    house.workers, house.coming = False, True
    waiting = [house.start(str(number)) for number in range(5)]
    await house.settle()
    assert [task.result() for task in waiting[3:]] == ["starting"] * 2
    assert not any(task.done() for task in waiting[:3])
    house.workers, house.places = True, 10
    await asyncio.gather(*waiting)


async def test_the_time_of_the_last_start_is_what_is_told(house: House) -> None:
    """After a start of 0.3 s, Retry-After in the next one is what is left of that."""
    house.build(max_starting_requests=1, wait_for_worker_s=5.0)
    house.workers = False
    first = house.start("a")
    await asyncio.sleep(0.3)
    house.workers = True
    assert await first == "began"
    house.running.clear()
    house.workers = False
    second, visit = house.start("b"), Visit()
    await house.settle()
    assert await house.run("c", visit=visit) == "no_workers"
    assert visit.refusal is not None
    assert 0.15 < (visit.refusal.retry_after_s or 0.0) < 0.5
    house.workers = True
    await second


async def test_who_was_let_in_waits_for_a_replacement(house: House) -> None:
    """After a loss a request does not queue again, and waits for a worker within the limit."""
    visit = Visit()
    await house.run("a", visit=visit)
    waiting = house.start("b")
    await house.settle()
    assert await house.run("a again", visit=visit) == "began"
    house.running.clear()
    assert await waiting == "began"
    house.running.clear()
    house.workers = False
    again = house.start("a once more", visit=visit)
    await house.settle()
    house.workers = True
    house.changed.set()
    assert await again == "began"


async def test_those_who_do_not_need_prefill_pass(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill pool is behind: who is read where it is decoded does not wait for it; but none passes at decode."""
    needs: dict[int, str] = {4: "prefill"}  # what a prompt of so many tokens waits for
    monkeypatch.setattr(waiting_room, "blocked", lambda plan, tokens, snapshot, policy: needs.get(tokens, ""))
    long = house.start("long", tokens=4)
    await house.settle()
    assert await house.run("short", tokens=5) == "began"
    assert not long.done()
    needs[4] = "decode"
    short = house.start("short", tokens=5)
    await house.settle()
    assert not long.done()
    assert not short.done()
    needs.clear()
    assert await asyncio.gather(long, short) == ["began"] * 2


async def test_what_waits_is_shown(house: House) -> None:
    """Requests and tokens by class, zero when the room is empty again."""
    await house.run("a")
    waiting = house.start("b", tokens=70, level=LOW)
    async with asyncio.timeout(10):
        while REGISTRY.get_sample_value("baton_waiting_requests", {"priority": "low"}) != 1:
            await asyncio.sleep(0.01)
    assert REGISTRY.get_sample_value("baton_waiting_tokens", {"priority": "low"}) == 70
    house.finish()
    await waiting
    await house.settle()
    assert REGISTRY.get_sample_value("baton_waiting_tokens", {"priority": "low"}) == 0
