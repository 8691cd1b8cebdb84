"""Who may go to an engine now, who has to wait, and how long that will take: pure functions over a snapshot.

Engines read prompts first come first served. So what is to have an order waits at the front end, and an engine gets
just enough work that it never stands still (`blocked`). How long the wait will be follows from the work ahead and from
the pace at which others were let in (`Pace`, `predicted_wait_s`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp
from typing import Literal, NamedTuple

from runtime.policy.pool import Pool
from runtime.policy.types import UNMEASURED, Disaggregated, Plan, Snapshot, WorkerView

CLASSES = ("high", "normal", "low")
"""Classes of priority, the first one first. A level is a place in this tuple."""

NORMAL = CLASSES.index("normal")

KEPT_BUSY = 2
"""A worker gets so many prompts, however long they take: one to read, and one that is there when it is done."""

PACE_MEMORY_S = 10.0
"""The pace of letting in counts 1/e after so many seconds."""

PACE_FORGETS = 0.125
"""One pause, however long, takes at most so much of what is known of the pace."""

PACE_TRUSTED_S, PACE_TRUSTED_REQUESTS = 0.5, 6
"""So many seconds of a queue, and so many requests let in, have to be seen before its pace says anything: after a hang,
one short prompt in all the seconds that it lasted."""


@dataclass(frozen=True)
class AdmissionPolicy:
    """Bounds of the queues, and their order.

    Attributes:
        engine_queue_s: a worker with so many seconds of prompts to read, and `KEPT_BUSY` of them, gets no more.
        engine_queue_tokens: the same in prompt tokens, for a worker without figures.
        engine_streams: requests on a decode worker that has not told how many fit into a step.
        max_wait_s: who would have to wait longer than this is refused. Nobody is left waiting for twice as long.
        max_waiting_requests: most requests that wait.
        max_waiting_tokens: most prompt tokens that wait.
        max_starting_requests: most requests that wait while there is no worker at all.
        ageing_s: who has waited for so long goes up by one class; also the most that a long prompt is put back.
        handicap_s: so many seconds is a prompt put back for each token, behind shorter ones of its class and tenant.
        weights: shares of tenants, by name; 1 for all others.
    """

    engine_queue_s: float = 0.5
    engine_queue_tokens: int = 2048
    engine_streams: int = 256
    max_wait_s: float = 120.0
    max_waiting_requests: int = 2048
    max_waiting_tokens: int = 4_000_000
    max_starting_requests: int = 512
    ageing_s: float = 10.0
    handicap_s: float = 0.001
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def patience_s(self) -> float:
        """Longest time that anybody is left waiting for, however wrong the prediction was."""
        return 2.0 * self.max_wait_s

    def weight(self, tenant: str) -> float:
        """A tenant's share, against that of others."""
        return self.weights.get(tenant, 1.0)


def level_of(priority: int) -> int:
    """The class of vLLM's `priority`, where lower numbers go first and 0 is what everybody has."""
    return NORMAL + (priority > 0) - (priority < 0)


Pools = Literal["", "prefill", "decode"]


def blocked(plan: Plan, prompt_tokens: int, snapshot: Snapshot, policy: AdmissionPolicy) -> Pools:
    """Which pool has to catch up before `plan` may begin; empty when it may begin now.

    A worker that may run out of work is never waited for. A plan that goes to a worker with a long queue although
    another one of its pool has none follows its cache, and routing has weighed that.
    """
    prefill, decode = Pool.of(snapshot.prefill), Pool.of(snapshot.decode)
    writer = decode.find(plan.decode) or prefill.find(plan.decode)
    if writer is not None and _is_full(writer, prompt_tokens, policy):
        return "decode"
    if not isinstance(plan, Disaggregated):
        return "prefill" if writer is not None and _is_behind(writer, policy) else ""
    reader = prefill.find(plan.prefill)
    if reader is None or not (_is_behind(reader, policy) or _lacks_blocks(reader, prompt_tokens)):
        return ""
    least = prefill.least_loaded(1, 0)[0]
    return "prefill" if _is_behind(least, policy) or _lacks_blocks(least, prompt_tokens) else ""


def _is_behind(worker: WorkerView, policy: AdmissionPolicy) -> bool:
    if worker.prefill is None:
        return worker.requests >= KEPT_BUSY and worker.waiting_tokens >= policy.engine_queue_tokens
    return worker.queued_requests >= KEPT_BUSY and worker.backlog_s >= policy.engine_queue_s


def _is_full(worker: WorkerView, prompt_tokens: int, policy: AdmissionPolicy) -> bool:
    if worker.max_streams is None:
        return worker.requests >= policy.engine_streams or _lacks_blocks(worker, prompt_tokens)
    return worker.streams >= worker.max_streams or _lacks_blocks(worker, prompt_tokens)


def _lacks_blocks(worker: WorkerView, prompt_tokens: int) -> bool:
    """Whether the prompt has to wait for blocks that others hold. Without others, waiting would not help."""
    return prompt_tokens > worker.room_tokens and bool(worker.streams or worker.requests or worker.waiting_tokens)


class Ahead(NamedTuple):
    """Work that comes before a request that waits."""

    tokens: float
    requests: float


class Pace:
    """How fast waiting requests were let in lately, while there was a queue all the time. The clock is an argument."""

    def __init__(self) -> None:
        self._last = self._seconds = self._tokens = self._requests = 0.0

    def begin(self, now: float) -> None:
        """A queue has formed."""
        self._last = now

    def note(self, now: float, tokens: int, requests: int) -> None:
        """So much was let in."""
        passed, self._last = now - self._last, now
        keep = max(exp(-passed / PACE_MEMORY_S), 1.0 - PACE_FORGETS)
        self._seconds = self._seconds * keep + passed
        self._tokens = self._tokens * keep + tokens
        self._requests = self._requests * keep + requests

    def seconds(self, ahead: Ahead) -> float | None:
        """How long it takes to let in what is ahead; None while nothing is known."""
        if self._seconds < PACE_TRUSTED_S or self._requests < PACE_TRUSTED_REQUESTS:
            return None
        tokens = ahead.tokens / self._tokens if self._tokens else 0.0
        return self._seconds * max(tokens, ahead.requests / self._requests)


def predicted_wait_s(ahead: Ahead, snapshot: Snapshot, pace: Pace) -> float:
    """Seconds until a request with so much work ahead of it may begin.

    What the engines hold, and then what is ahead: at the pace seen lately, or at the speed that the workers have told.
    """
    readers = Pool.of(snapshot.prefill or snapshot.decode)
    if not readers:
        return 0.0
    least = readers.least_loaded(1, 0)[0]
    if least.prefill is None:  # only the pace tells how fast it reads: what it has is work ahead like any other
        ahead = Ahead(ahead.tokens + least.waiting_tokens * len(readers), ahead.requests)
    seconds = pace.seconds(ahead)
    if seconds is None:
        seconds = ahead.tokens * (least.prefill or UNMEASURED).each_s / len(readers)
    return seconds if least.prefill is None else least.backlog_s + seconds
