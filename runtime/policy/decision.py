"""One request against one snapshot: which plans there are, which one wins, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple
from zlib import crc32

from runtime.policy.pool import Pool
from runtime.policy.predict import Share, alone, alone_beside, alone_idle, read, write
from runtime.policy.types import (
    UNMEASURED,
    Disaggregated,
    Load,
    Local,
    Plan,
    Predicted,
    RequestView,
    RoutingSettings,
    Snapshot,
    WorkerView,
)

SCANNED = 32
"""So many of the workers that hold most of a prompt are looked at first."""

SAME = 0.001
"""Differences below this (seconds; parts of a limit) don't count: equally good workers share the load instead."""

WIDER = 4
"""So many times the shortlist is looked at when none of it keeps the limits."""


ShareOf = Callable[[WorkerView, RequestView, RoutingSettings], Share]


class Candidate(NamedTuple):
    """A plan in the making."""

    kind: str  # "disaggregated", "local", "idle" (a long prompt on an idle decode worker) or "borrowed"
    reads: Share | None  # None when one worker does all
    writes: Share
    ttft_s: float
    excess: float
    barred: str = ""  # why it is shown but can't be chosen


def rank(candidate: Candidate) -> tuple[bool, int, int, str]:
    """Orders candidates, the best one first: within the limits, then by time to first token."""
    return bool(candidate.barred), _thousandths(candidate.excess), _thousandths(candidate.ttft_s), candidate.kind


class Decision:
    """One request against one snapshot.

    Only a few workers of each pool are looked at, by load and by what they hold, so that a decision costs about the
    same with ten workers and with a thousand. The halves of a disaggregated plan don't depend on each other: the best
    pair is the best of each.
    """

    def __init__(self, request: RequestView, snapshot: Snapshot, settings: RoutingSettings) -> None:
        self._request = request
        self._settings = settings
        self._prefill = Pool.of(snapshot.prefill)
        self._decode = Pool.of(snapshot.decode)
        self._handoff_s = snapshot.handoff_s
        self._spread = crc32(request.request_id.encode())
        self._forced = self._why_whole()
        self._few_prefill = self._shortlist(self._prefill, settings.shortlist)
        self._few_decode = self._shortlist(self._decode, settings.shortlist)
        self._reads: list[Share] = []
        self._writes: list[Share] = []
        self._candidates = self._choose_from()
        self.winner = min(self._candidates, key=rank)

    def plan(self) -> Plan:
        """The plan that wins."""
        return self.as_plan(self.winner, self._reason())

    # The candidates

    def _why_whole(self) -> str:
        """Why the request has to run whole, if it has to."""
        if not self._decode:
            return "no_decode_workers"
        if not self._request.can_disaggregate:
            return "needs_prompt_logprobs"
        return "" if self._prefill else "no_prefill_workers"

    def _choose_from(self) -> list[Candidate]:
        mode = self._settings.mode
        if mode == "never":
            return [self._alone("local", self._best([*self._decode_alone(), *self._prefill_alone()]))]
        if self._forced:
            return self._whole_only()
        self._reads = self._shares(self._prefill, self._few_prefill, read)
        self._writes = self._shares(self._decode, self._few_decode, write)
        pair = self._pair(self._best(self._reads), self._best(self._writes))
        if mode == "always":
            return [pair]
        return [pair, *self._local(), *self._borrowed(self._writes)]

    def _whole_only(self) -> list[Candidate]:
        if not self._decode:
            return [self._alone("borrowed", self._best(self._prefill_alone()))]
        shares = self._decode_alone()
        return [self._alone("local", self._best(shares)), *self._borrowed(shares)]

    def _local(self) -> list[Candidate]:
        """The decode worker reads the prompt itself: a short one, or any when it is idle and prefill is behind."""
        shares = [share for share in self._decode_alone() if share.worker.prefill is not None]
        if not shares:
            return []
        candidates = [self._alone("local", self._best(shares))]
        if self._settings.borrow and self._prefill_is_behind():
            idle = [share.worker for share in shares if _idle(share.worker)]
            shares = [alone_idle(worker, self._request, self._settings) for worker in idle]
            candidates += [self._alone("idle", self._best(shares))] if shares else []
        return candidates

    def _borrowed(self, decode: Sequence[Share]) -> list[Candidate]:
        """An idle prefill worker runs the whole request, when none of the decode workers keeps the limits."""
        if not self._settings.borrow or self._settings.mode != "adaptive" or not _all_over(decode):
            return []
        shares = [s for s in self._prefill_alone() if not s.worker.waiting_tokens and s.worker.prefill is not None]
        return [self._alone("borrowed", self._best(shares))] if shares else []

    def _prefill_is_behind(self) -> bool:
        return all(share.worker.backlog_s >= self._settings.behind_s for share in self._reads)

    def _pair(self, reads: Share, writes: Share) -> Candidate:
        ttft_s = reads.seconds + self._handoff_s + writes.seconds
        return Candidate("disaggregated", reads, writes, ttft_s, max(reads.excess, writes.excess))

    def _alone(self, kind: str, share: Share) -> Candidate:
        return Candidate(kind, None, share, share.seconds, share.excess)

    # The workers that are looked at

    def _prefill_alone(self) -> list[Share]:
        return self._shares(self._prefill, self._few_prefill, alone)

    def _decode_alone(self) -> list[Share]:
        return self._shares(self._decode, self._few_decode, alone_beside)

    def _shares(self, pool: Pool, few: list[WorkerView], share_of: ShareOf) -> list[Share]:
        """The shares of a few workers; of more when none of the few keeps the limits."""
        request, settings = self._request, self._settings
        shares = [share_of(worker, request, settings) for worker in few]
        if len(pool) > len(few) and _all_over(shares):
            more = self._shortlist(pool, WIDER * settings.shortlist)
            shares = [share_of(worker, request, settings) for worker in more]
        return shares

    def _shortlist(self, pool: Pool, count: int) -> list[WorkerView]:
        """The least loaded workers of a pool first, then those that hold most of the prompt."""
        workers = pool.least_loaded(count, self._spread)
        if self._request.cached and len(workers) < len(pool):
            known = {worker.engine_id for worker in workers}
            names = [name for name in islice(self._request.cached, SCANNED) if name not in known]
            holders = [worker for name in names if (worker := pool.find(name))]
            workers += holders if len(holders) <= count else sorted(holders, key=self._reading_s)[:count]
        return workers

    def _reading_s(self, worker: WorkerView) -> float:
        cost = worker.prefill or UNMEASURED
        return worker.backlog_s + cost.each_s * (self._request.prompt_tokens - self._request.cached[worker.engine_id])

    def _best(self, shares: Sequence[Share]) -> Share:
        """The share with the least seconds of those within the limits; equal ones by load, then by the request's id."""
        within = [share for share in shares if not share.excess]
        if not within:
            least = min(share.excess for share in shares)
            within = [share for share in shares if share.excess < least + SAME]
        soonest = min([share.seconds for share in within])
        equal = [share for share in within if share.seconds < soonest + SAME]
        return equal[0] if len(equal) == 1 else min(equal, key=self._tie)

    def _tie(self, share: Share) -> tuple[Load, int]:
        return share.worker.load, crc32(share.worker.engine_id.encode(), self._spread)

    # The answer

    def as_plan(self, candidate: Candidate, reason: str) -> Plan:
        """A candidate as a plan, with what is predicted of it."""
        reads, writes = candidate.reads, candidate.writes
        uncached = self._request.prompt_tokens - (reads or writes).cached
        if reads is None:
            gap_s, pulled, measured = writes.gap_s, 0, writes.worker.prefill is not None
        else:
            gap_s, pulled = max(reads.gap_s, writes.gap_s), self._request.prompt_tokens - writes.cached
            measured = reads.worker.prefill is not None and writes.worker.step is not None
        predicted = Predicted(candidate.ttft_s, writes.itl_s, gap_s, uncached, pulled, measured)
        if reads is None:
            return Local(writes.worker.engine_id, reason, predicted)
        return Disaggregated(reads.worker.engine_id, writes.worker.engine_id, reason, predicted)

    def _reason(self) -> str:
        """One of `runtime.policy.routing.REASONS`."""
        winner, mode = self.winner, self._settings.mode
        if mode == "never" or (mode == "always" and winner.reads):
            return mode
        if self._forced:
            return "decode_behind" if winner.kind == "borrowed" and self._decode else self._forced
        if (winner.reads or winner.writes).worker.prefill is None:
            return "least_loaded"
        if winner.excess:
            return "over_limits"
        if winner.reads is None:
            return {"local": "short_prompt", "idle": "decode_idle", "borrowed": "decode_behind"}[winner.kind]
        if winner.reads.cached > min(self._reads, key=lambda share: share.worker.load).cached:
            return "follows_cache"
        quicker = (c for c in self._candidates if c.ttft_s < winner.ttft_s and c.kind == "local")
        return "protects_streams" if any(quicker) else "least_ttft"

    def all_candidates(self) -> list[Candidate]:
        """For `explain`: each worker that was looked at, alone and with the best of the other pool."""
        chosen = list(self._candidates)
        shown = list(chosen)
        if not self._forced and self._settings.mode != "never":
            best_read, best_write = self._best(self._reads), self._best(self._writes)
            shown += [self._pair(reads, best_write) for reads in self._reads if reads is not best_read]
            shown += [self._pair(best_read, writes) for writes in self._writes if writes is not best_write]
        for kind, shares in (("local", self._decode_alone()), ("borrowed", self._prefill_alone())):
            seen = {c.writes for c in chosen if c.kind == kind}
            shown += [self._bar(self._alone(kind, share)) for share in shares if share not in seen]
        return shown

    def _bar(self, candidate: Candidate) -> Candidate:
        """Why a whole request on this worker could not be chosen, if so."""
        mode, share = self._settings.mode, candidate.writes
        barred = ""
        if mode == "always" and not self._forced:
            barred = "the settings disaggregate what can be"
        elif mode == "adaptive" and not self._forced and share.worker.prefill is None:
            barred = "the worker has no figures to predict its gap from"
        elif candidate.kind == "borrowed" and mode == "adaptive" and self._decode:
            if share.worker.waiting_tokens:
                barred = "the prefill worker has prompts of its own"
            elif not self._borrowed(self._decode_alone() if self._forced else self._writes):
                barred = "the decode pool is not behind"
        return candidate._replace(barred=barred)


def _idle(worker: WorkerView) -> bool:
    return not (worker.streams or worker.waiting_tokens or worker.pulling_tokens)


def _all_over(shares: Sequence[Share]) -> bool:
    return bool(shares[0].excess) and all(share.excess for share in shares)


def _thousandths(value: float) -> int:
    """Milliseconds, or thousandths of a limit: coarse, so that equally good plans are equal."""
    return int(value * 1000)
