"""One request against one snapshot: which plans there are, which one wins, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple
from zlib import crc32

from runtime.policy.pool import Pool
from runtime.policy.predict import Share, alone, alone_beside, alone_idle, read, reading_s, write
from runtime.policy.shortlist import Shortlist, shortlist
from runtime.policy.types import (
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

SAME = 0.001
"""Differences below this (seconds; parts of a limit) don't count: equally good workers share the load instead."""

SLACK = 1.1
"""So many times the least time between tokens is a limit where the settings' limit can't be kept."""

WIDER = 4
"""So many times the shortlist is looked at when none of it keeps the limits."""

_PREFILL, _DECODE = 0, 1  # places of the pools, and of their shortlists

ShareOf = Callable[[WorkerView, int, int, RoutingSettings], Share]


class Candidate(NamedTuple):
    """A plan in the making."""

    kind: str  # "disaggregated", "local", "idle" (a long prompt on an idle decode worker) or "borrowed"
    reads: Share | None  # None when one worker does all
    writes: Share
    ttft_s: float
    excess: float
    barred: str = ""  # why it is shown but can't be chosen
    delays_s: float = 0.0  # how long prompts that come after it wait for it

    @property
    def costs_s(self) -> float:
        """Its time to first token, and what it adds to that of others."""
        return self.ttft_s + self.delays_s


def rank(candidate: Candidate) -> tuple[bool, int, int, str]:
    """Orders candidates, the best one first: within the limits, then by time to first token.

    In thousandths of a limit and in milliseconds: coarse, so that equally good plans are equal.
    """
    return bool(candidate.barred), int(candidate.excess * 1000), int(candidate.costs_s * 1000), candidate.kind


class Decision:
    """One request against one snapshot.

    Only a few workers of each pool are looked at, by load and by what they hold, so that a decision costs about the
    same with ten workers and with a thousand. The halves of a disaggregated plan don't depend on each other: the best
    pair is the best of each.
    """

    def __init__(self, request: RequestView, snapshot: Snapshot, settings: RoutingSettings) -> None:
        self._request = request
        self._handoff_s = snapshot.handoff_s
        self._spread = crc32(request.request_id.encode())
        self._pools = Pool.of(snapshot.prefill), Pool.of(snapshot.decode)
        self._few = shortlist(*self._pools, request, settings.shortlist, self._spread)
        self._settings = self._limits_that_can_be_kept(settings)
        self._strained = self._settings is not settings
        self._forced = self._why_whole()
        self._reads: list[Share] = []
        self._candidates = self._choose_from()
        self.winner = min(self._candidates, key=rank)

    def plan(self) -> Plan:
        """The plan that wins."""
        return self.as_plan(self.winner, self._reason())

    def _limits_that_can_be_kept(self, settings: RoutingSettings) -> RoutingSettings:
        """The settings; where no decode worker keeps the time between tokens, with limits that the quickest one keeps.

        Limits that are passed anyway, by the streams that are there, would rule nothing out: a plan that holds all of
        them up for seconds would stand beside one that hardly makes a difference.
        """
        least_s = SLACK * min([worker.step_s for worker, _ in self._few[_DECODE]], default=0.0)
        if settings.mode != "adaptive" or least_s <= settings.itl_limit_s:
            return settings
        gap_s = settings.gap_limit_s * least_s / settings.itl_limit_s
        return replace(settings, itl_limit_s=least_s, gap_limit_s=gap_s)

    # The candidates

    def _why_whole(self) -> str:
        """Why the request has to run whole, if it has to."""
        prefill, decode = self._pools
        if not decode:
            return "no_decode_workers"
        if not self._request.can_disaggregate:
            return "needs_prompt_logprobs"
        return "" if prefill else "no_prefill_workers"

    def _choose_from(self) -> list[Candidate]:
        mode = self._settings.mode
        if mode == "never":
            return [self._alone("local", self._best([*self._decode_alone(), *self._prefill_alone()]))]
        if self._forced:
            return self._whole_only()
        self._reads = self._shares(_PREFILL, read)
        local = self._local() if mode == "adaptive" else []
        if any(map(self._sooner_than_read, local)):
            return local
        pair = self._pair(self._best(self._reads), self._best(self._writes))
        return [pair, *local, *self._borrowed(self._writes)]

    def _whole_only(self) -> list[Candidate]:
        if not self._pools[_DECODE]:
            return [self._alone("borrowed", self._best(self._prefill_alone()))]
        shares = self._decode_alone()
        return [self._alone("local", self._best(shares)), *self._borrowed(shares)]

    def _local(self) -> list[Candidate]:
        """The decode worker reads the prompt itself: a short one, or any when it is idle and prefill is behind."""
        shares = [share for share in self._decode_alone() if share.worker.prefill is not None]
        if not shares:
            return []
        candidates = [self._beside_streams(self._best(shares))]
        if self._settings.borrow and self._prefill_is_behind():
            tokens, settings = self._request.prompt_tokens, self._settings
            idle = [(share.worker, share.cached) for share in shares if _idle(share.worker)]
            shares = [alone_idle(worker, tokens, cached, settings) for worker, cached in idle]
            candidates += [self._alone("idle", self._best(shares))] if shares else []
        return candidates

    def _borrowed(self, decode: Sequence[Share]) -> list[Candidate]:
        """An idle prefill worker runs the whole request, when none of the decode workers keeps the limits."""
        if not self._settings.borrow or self._settings.mode != "adaptive":
            return []
        if not self._strained and not _all_over(decode):
            return []
        shares = [s for s in self._prefill_alone() if not s.worker.waiting_tokens and s.worker.prefill is not None]
        return [self._alone("borrowed", self._best(shares))] if shares else []

    def _prefill_is_behind(self) -> bool:
        return min([share.worker.backlog_s for share in self._reads]) >= self._settings.behind_s

    def _sooner_than_read(self, local: Candidate) -> bool:
        """Whether it keeps the limits, and prefill workers would still be reading the prompt: nothing beats it then."""
        return not local.excess and local.costs_s + SAME < min([share.seconds for share in self._reads])

    def _pair(self, reads: Share, writes: Share) -> Candidate:
        ttft_s = reads.seconds + self._handoff_s + writes.seconds
        return Candidate("disaggregated", reads, writes, ttft_s, max(reads.excess, writes.excess))

    def _alone(self, kind: str, share: Share) -> Candidate:
        return Candidate(kind, None, share, share.seconds, share.excess)

    def _beside_streams(self, share: Share) -> Candidate:
        """A decode worker reads the prompt. A long one counts twice: short prompts that come to be read there wait for
        it, and it is what keeps their first tokens soon that they are read there."""
        delays_s = reading_s(share, self._request.prompt_tokens)
        local = self._alone("local", share)
        return local._replace(delays_s=delays_s) if delays_s > self._settings.gap_limit_s else local

    # The workers that are looked at

    def _prefill_alone(self) -> list[Share]:
        return self._shares(_PREFILL, alone)

    def _decode_alone(self) -> list[Share]:
        return self._shares(_DECODE, alone_beside)

    @cached_property
    def _writes(self) -> list[Share]:
        return self._shares(_DECODE, write)

    def _shares(self, role: int, share_of: ShareOf) -> list[Share]:
        """The shares of a few workers of a pool; of more when none of the few keeps the limits."""
        tokens, settings = self._request.prompt_tokens, self._settings
        shares = [share_of(worker, tokens, cached, settings) for worker, cached in self._few[role]]
        if len(shares) < len(self._pools[role]) and _all_over(shares):
            shares = [share_of(worker, tokens, cached, settings) for worker, cached in self._more[role]]
        return shares

    @cached_property
    def _more(self) -> Shortlist:
        """More workers, for when none of a pool's few keeps the limits."""
        return shortlist(*self._pools, self._request, WIDER * self._settings.shortlist, self._spread)

    def _best(self, shares: Sequence[Share]) -> Share:
        """The share with the least seconds of those within the limits; equal ones by load, then by the request's id."""
        within = [share for share in shares if not share.excess] or _least_over(shares)
        almost = min([share.seconds for share in within]) + SAME
        equal = [share for share in within if share.seconds < almost]
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
            return "decode_behind" if winner.kind == "borrowed" and self._pools[_DECODE] else self._forced
        if (winner.reads or winner.writes).worker.prefill is None:
            return "least_loaded"
        if winner.excess or (self._strained and winner.kind != "borrowed"):
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
            shown += [] if any(c.reads for c in chosen) else [self._pair(best_read, best_write)]
            shown += [self._pair(reads, best_write) for reads in self._reads if reads is not best_read]
            shown += [self._pair(best_read, writes) for writes in self._writes if writes is not best_write]
        for kind, shares in (("local", self._decode_alone()), ("borrowed", self._prefill_alone())):
            seen = [c.writes.worker for c in chosen if c.kind == kind]
            shown += [self._bar(self._alone(kind, share)) for share in shares if share.worker not in seen]
        return shown

    def _bar(self, candidate: Candidate) -> Candidate:
        """Why a whole request on this worker could not be chosen, if so."""
        mode, share = self._settings.mode, candidate.writes
        barred = ""
        if mode == "always" and not self._forced:
            barred = "the settings disaggregate what can be"
        elif mode == "adaptive" and not self._forced and share.worker.prefill is None:
            barred = "the worker has no figures to predict its gap from"
        elif candidate.kind == "borrowed" and mode == "adaptive" and self._pools[_DECODE]:
            if share.worker.waiting_tokens:
                barred = "the prefill worker has prompts of its own"
            elif not self._borrowed(self._decode_alone() if self._forced else self._writes):
                barred = "the decode pool is not behind"
        return candidate._replace(barred=barred)


def _idle(worker: WorkerView) -> bool:
    return not (worker.streams or worker.waiting_tokens or worker.pulling_tokens)


def _least_over(shares: Sequence[Share]) -> list[Share]:
    least = min([share.excess for share in shares])
    return [share for share in shares if share.excess < least + SAME]


def _all_over(shares: Sequence[Share]) -> bool:
    return bool(shares[0].excess) and all(share.excess for share in shares)
