"""The order of those who wait: classes with ageing, fair shares among tenants, short prompts first.

1. The class decides. Who is overdue by `ageing_s` counts as one class better, so nobody waits for ever.
2. Within a class, the tenant that has had least for its weight (start-time fair queueing, in tokens).
3. Of one tenant, the request that is due first: arrival, plus a handicap for each token of its prompt. So a prompt is
   overtaken only by shorter ones that come within its handicap.

Arithmetic and lists: no clock of its own, no I/O.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice, zip_longest

from runtime.policy.admission import AdmissionPolicy, Ahead


@dataclass(frozen=True, slots=True)
class Claim:
    """A response that waits to begin.

    Attributes:
        number: unique, and larger than those of all claims that came before.
        tokens: prompt tokens that have to be read.
        requests: how many requests the response is made of; they begin together.
        arrived: monotonic seconds.
    """

    number: int
    level: int
    tenant: str
    tokens: int
    requests: int
    arrived: float


@dataclass(eq=False, slots=True)
class _Lane:
    """What one tenant has waiting in one class, by when it is due."""

    level: int
    tenant: str
    order: list[tuple[float, int]] = field(default_factory=list)
    claims: dict[int, Claim] = field(default_factory=dict)  # the newest last
    tokens: int = 0
    requests: int = 0


class FairQueue:
    """Claims in the order in which they may begin."""

    def __init__(self, policy: AdmissionPolicy) -> None:
        self._policy = policy
        self._lanes: dict[tuple[int, str], _Lane] = {}
        self._clock = 0.0  # virtual time: what a tenant that always waited has had, for its weight
        self._served: dict[str, float] = {}  # what tenants have had, where that is more

    def __len__(self) -> int:
        """Claims that wait."""
        return sum(len(lane.claims) for lane in self._lanes.values())

    def waiting(self, level: int) -> tuple[int, int]:
        """Requests and tokens of a class."""
        lanes = [lane for lane in self._lanes.values() if lane.level == level]
        return sum(lane.requests for lane in lanes), sum(lane.tokens for lane in lanes)

    def due(self, claim: Claim) -> float:
        """When it would be a claim's turn, if it were for its arrival and its length alone."""
        return claim.arrived + min(claim.tokens * self._policy.handicap_s, self._policy.ageing_s)

    def add(self, claim: Claim) -> None:
        """Take in a claim."""
        lane = self._lanes.setdefault((claim.level, claim.tenant), _Lane(claim.level, claim.tenant))
        insort(lane.order, (self.due(claim), claim.number))
        lane.claims[claim.number] = claim
        lane.tokens += claim.tokens
        lane.requests += claim.requests

    def remove(self, claim: Claim) -> None:
        """Take out a claim that waits no more. Unknown ones are ignored."""
        lane = self._lanes.get((claim.level, claim.tenant))
        if lane is None or lane.claims.pop(claim.number, None) is None:
            return
        del lane.order[bisect_left(lane.order, (self.due(claim), claim.number))]
        lane.tokens -= claim.tokens
        lane.requests -= claim.requests
        if not lane.claims:
            del self._lanes[(claim.level, claim.tenant)]
        if not self._lanes:  # nobody is waiting, so nobody was treated unfairly
            self._served.clear()

    def take(self, claim: Claim) -> None:
        """Take out a claim that begins, and count it as what its tenant has had."""
        self._clock = max(self._clock, self._start(claim.tenant))
        self.charge(claim.tenant, claim.tokens)
        self.remove(claim)

    def charge(self, tenant: str, tokens: int) -> None:
        """Count tokens as what a tenant has had; without effect when nobody waits."""
        if self._lanes:
            self._served[tenant] = self._start(tenant) + tokens / self._policy.weight(tenant)

    def in_order(self, now: float, count: int) -> list[Claim]:
        """Some claims, the first of which is the next to begin; after it only roughly in order."""
        lanes = nsmallest(count, self._lanes.values(), key=lambda lane: self._rank(lane, now))
        rounds = zip_longest(*([lane.claims[number] for _, number in lane.order[:count]] for lane in lanes))
        return list(islice((claim for some in rounds for claim in some if claim), count))

    def overflow(self) -> list[Claim]:
        """Take out what is too much: of the last class, of who has most waiting for its weight, the newest first."""
        out: list[Claim] = []
        while self._lanes and self._is_over():
            worst = max(lane.level for lane in self._lanes.values())
            lanes = (lane for lane in self._lanes.values() if lane.level == worst)
            lane = max(lanes, key=lambda lane: lane.tokens / self._policy.weight(lane.tenant))
            out.append(next(reversed(lane.claims.values())))
            self.remove(out[-1])
        return out

    def ahead(self, claim: Claim) -> Ahead:
        """What comes before a claim, waiting or not: better classes, the own tenant's, the fair share of others."""
        own = self._lanes.get((claim.level, claim.tenant))
        tokens = requests = 0.0
        if own:
            part = bisect_left(own.order, (self.due(claim), claim.number)) / len(own.order)
            tokens, requests = own.tokens * part, own.requests * part
        mine = (tokens + claim.tokens) / self._policy.weight(claim.tenant)
        for lane in self._lanes.values():
            if lane.level > claim.level or lane is own:
                continue
            part = 1.0
            if lane.level == claim.level and lane.tokens:
                part = min(1.0, mine * self._policy.weight(lane.tenant) / lane.tokens)
            tokens += lane.tokens * part
            requests += lane.requests * part
        return Ahead(tokens, requests)

    def _start(self, tenant: str) -> float:
        return max(self._served.get(tenant, 0.0), self._clock)

    def _rank(self, lane: _Lane, now: float) -> tuple[float, float, float]:
        due = lane.order[0][0]
        promoted = max(0.0, now - due) // self._policy.ageing_s
        return max(0.0, lane.level - promoted), self._start(lane.tenant), due

    def _is_over(self) -> bool:
        lanes = self._lanes.values()
        return (
            sum(lane.requests for lane in lanes) > self._policy.max_waiting_requests
            or sum(lane.tokens for lane in lanes) > self._policy.max_waiting_tokens
        )
