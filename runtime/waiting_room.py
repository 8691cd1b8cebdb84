"""Where requests wait at the front end until an engine may have them, so that engines' queues are short and the order
is Baton's.

While nobody waits and the workers have room, a request passes without a single suspension. Everything else is decided
by one task (`WaitingRoom._keep`): who is next, who has waited too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from runtime.errors import Refusal
from runtime.metrics import TENANT_TOKENS, WAITED_SECONDS, WAITING_REQUESTS, WAITING_TOKENS
from runtime.policy.admission import CLASSES, AdmissionPolicy, Pace, blocked, predicted_wait_s
from runtime.policy.fair_queue import Claim, FairQueue
from runtime.policy.types import Plan, Refused, RequestView, Snapshot
from runtime.visit import Visit

logger = logging.getLogger("baton.admission")

POLL_S = 0.05
"""Longest time until news of the workers, or that somebody has waited too long, is noticed."""

LOOKAHEAD = 8
"""When the prefill pool is behind, so many of those next in order are looked at for one that does not need it."""

START_S = 10.0
"""How long a start takes, as long as none was seen. For Retry-After."""

OTHERS = "other"
"""What tenants without a name in the settings are called in metrics, whose labels have to stay few."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of a request and of the workers at one moment, and the plan that follows."""

    view: RequestView
    snapshot: Snapshot
    plan: Plan | Refused


Looker = Callable[[], Look]
"""Looks at a request and the workers anew. Without effect: most looks of who waits come to nothing."""


@dataclass(eq=False)
class _Party:
    """The requests of one visit that wait together."""

    visit: Visit
    claim: Claim
    look: Looker
    since: float
    waiters: list[asyncio.Future[None]] = field(default_factory=list)


class WaitingRoom:
    """The queue in front of both pools.

    Args:
        wait_for_worker_s: how long to wait while there is no worker at all.
        coming: whether a worker is on its way.
        changed: an event that is set when workers come, go, or become ready; asked for anew each time.
    """

    def __init__(
        self,
        policy: AdmissionPolicy,
        wait_for_worker_s: float,
        coming: Callable[[], bool],
        changed: Callable[[], asyncio.Event],
    ) -> None:
        self._policy = policy
        self._wait_for_worker_s = wait_for_worker_s
        self._coming = coming
        self._changed = changed
        self._queue = FairQueue(policy)
        self._parties: dict[Visit, _Party] = {}
        self._by_number: dict[int, _Party] = {}
        self._arrivals = 0
        self._waited = [WAITED_SECONDS.labels(name) for name in CLASSES]
        self._pace = Pace()
        self._poked = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._outage: float | None = None  # since when there has been no worker at all
        self._last_outage_s = START_S

    async def enter(self, visit: Visit, level: int, look: Looker) -> tuple[Plan, Look]:
        """The plan for a request, once it may begin, and the look that it follows from.

        Raises:
            Refusal: it may not; all requests of its visit get the same answer.
        """
        if not visit.admitted:
            first = look()
            if self._passes(visit, first) and not isinstance(first.plan, Refused):
                self._waited[level].observe(0.0)
                return first.plan, first
            await self._wait(visit, level, first, look)
        return await self._worker(look)

    def _passes(self, visit: Visit, look: Look) -> bool:
        """Let a visit in at once if nobody waits and the workers have room."""
        now = time.monotonic()
        if visit.deadline is not None and visit.deadline <= now:
            visit.refuse(_too_late())
        if visit.refusal is not None:
            raise visit.refusal
        if self._parties or self._lacking(look):
            return False
        visit.admitted = True
        return True

    def poke(self) -> None:
        """Something has ended: perhaps somebody may begin."""
        if self._parties:
            self._poked.set()

    def ended(self, visit: Visit, prompt_tokens: int, made_tokens: int) -> None:
        """Count a request that was let in: its answer's tokens, too, are what its tenant has had."""
        self._queue.charge(visit.tenant, made_tokens)
        tenant = visit.tenant if visit.tenant in self._policy.weights else OTHERS
        TENANT_TOKENS.labels(tenant).inc(prompt_tokens + made_tokens)

    def _lacking(self, look: Look) -> str:
        """Which pool has to catch up first, or that there is no worker; empty when the request may begin."""
        if isinstance(look.plan, Refused):
            return look.plan.reason
        return blocked(look.plan, look.view.prompt_tokens, look.snapshot, self._policy)

    async def _worker(self, look: Looker) -> tuple[Plan, Look]:
        """A plan for somebody who was let in; while there is no worker, wait for one, within bounds."""
        deadline = time.monotonic() + self._wait_for_worker_s
        while isinstance((found := look()).plan, Refused):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed().wait()
            except TimeoutError:
                raise self._no_worker() from None
        return found.plan, found

    async def _wait(self, visit: Visit, level: int, first: Look, look: Looker) -> None:
        waiter = asyncio.get_running_loop().create_future()
        party = self._join(visit, level, first, look)
        party.waiters.append(waiter)
        self._poked.set()  # perhaps it may pass those who wait for the prefill pool
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep(), context=contextvars.Context())
        try:
            await waiter
        except asyncio.CancelledError:
            party.waiters.remove(waiter)
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # it was refused as well, and nobody is left to be told
            if not party.waiters and self._parties.get(visit) is party:
                self._leave(party)
            raise

    def _join(self, visit: Visit, level: int, first: Look, look: Looker) -> _Party:
        """Take a request into the queue, with what waits of its visit already; or refuse the visit."""
        now = time.monotonic()
        tokens = first.view.prompt_tokens - next(iter(first.view.cached.values()), 0)
        if party := self._parties.get(visit):
            self._queue.remove(party.claim)
            claim = replace(party.claim, tokens=party.claim.tokens + tokens, requests=party.claim.requests + 1)
            party.claim = claim
        else:
            if not self._parties:
                self._pace.begin(now)
            self._arrivals += 1
            claim = Claim(self._arrivals, level, visit.tenant, tokens, 1, now)
            self._check(visit, claim, first.snapshot)
            party = self._parties[visit] = self._by_number[claim.number] = _Party(visit, claim, look, now)
        self._queue.add(claim)
        for victim in self._queue.overflow():
            self._refuse(self._by_number[victim.number], self._overloaded(victim, first.snapshot))
        if visit.refusal is not None:
            raise visit.refusal
        return party

    def _check(self, visit: Visit, claim: Claim, snapshot: Snapshot) -> None:
        """Refuse who would have to wait too long.

        Raises:
            Refusal: as was said.
        """
        refusal: Refusal | None = None
        if not (snapshot.prefill or snapshot.decode):
            waiting = sum(self._queue.waiting(level)[0] for level in range(len(CLASSES)))
            if waiting >= self._policy.max_starting_requests:
                refusal = self._no_worker()
        else:
            wait_s = predicted_wait_s(self._queue.ahead(claim), snapshot, self._pace)
            left_s = math.inf if visit.deadline is None else visit.deadline - claim.arrived
            if wait_s > min(self._policy.max_wait_s, left_s):
                refusal = self._overloaded(claim, snapshot)
        if refusal is not None:
            visit.refuse(refusal)
            raise refusal

    # The keeper

    async def _keep(self) -> None:
        """Let in who may begin, one after the other; refuse who has waited too long; until nobody waits."""
        while self._parties:
            now = time.monotonic()
            if party := self._next(now):
                self._let_in(party, now)
                await asyncio.sleep(0)  # it begins now, and counts as load for the next one
                continue
            self._expire(now)
            self._tell()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), POLL_S)
            self._poked.clear()
        self._tell()

    def _next(self, now: float) -> _Party | None:
        for claim in self._queue.in_order(now, LOOKAHEAD):
            party = self._by_number[claim.number]
            look = party.look()
            self._note_outage(isinstance(look.plan, Refused), now)
            lacking = self._lacking(look)
            if not lacking:
                return party
            if lacking != "prefill":  # everybody needs it, and who passes would take what the first one waits for
                return None
        return None

    def _let_in(self, party: _Party, now: float) -> None:
        self._pace.note(now, party.claim.tokens, party.claim.requests)
        self._queue.take(party.claim)
        self._leave(party)
        party.visit.admitted = True
        self._waited[party.claim.level].observe(now - party.claim.arrived)
        for waiter in party.waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _expire(self, now: float) -> None:
        patience_s = self._policy.patience_s if self._outage is None else self._wait_for_worker_s
        for party in list(self._parties.values()):
            if party.visit.deadline is not None and party.visit.deadline <= now:
                self._refuse(party, _too_late())
            elif now - party.since >= patience_s:
                snapshot = party.look().snapshot
                refusal = self._overloaded(party.claim, snapshot) if self._outage is None else self._no_worker()
                self._refuse(party, refusal)

    def _note_outage(self, is_out: bool, now: float) -> None:
        """Follow whether there is any worker; waiting for one does not count as waiting in the queue."""
        if is_out and self._outage is None:
            self._outage = now
        elif not is_out and self._outage is not None:
            self._last_outage_s = now - self._outage
            self._outage = None
            for party in self._parties.values():
                party.since = now

    def _refuse(self, party: _Party, refusal: Refusal) -> None:
        self._leave(party)
        party.visit.refuse(refusal)
        for waiter in party.waiters:
            if not waiter.done():
                waiter.set_exception(refusal)

    def _leave(self, party: _Party) -> None:
        self._queue.remove(party.claim)
        del self._parties[party.visit], self._by_number[party.claim.number]

    def _overloaded(self, claim: Claim, snapshot: Snapshot) -> Refusal:
        wait_s = predicted_wait_s(self._queue.ahead(claim), snapshot, self._pace)
        return Refusal("overloaded", "This server has more to do than it can begin in time.", wait_s)

    def _no_worker(self) -> Refusal:
        waited_s = time.monotonic() - self._outage if self._outage is not None else 0.0
        left_s = self._last_outage_s - waited_s
        if self._coming():
            return Refusal("starting", "This server is starting: no worker is ready yet.", left_s)
        return Refusal("no_workers", "This server has no worker.", left_s if left_s > 0 else START_S)

    def _tell(self) -> None:
        for level, name in enumerate(CLASSES):
            requests, tokens = self._queue.waiting(level)
            WAITING_REQUESTS.labels(name).set(requests)
            WAITING_TOKENS.labels(name).set(tokens)


def _too_late() -> Refusal:
    return Refusal("deadline", "The request's deadline passed before it could begin.")
