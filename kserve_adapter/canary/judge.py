"""The judgement: promote, hold or roll back, with reasons. Pure: evidence and settings in, verdict out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from kserve_adapter.canary.sequential import Interval, compared, mean, proportion

TAIL = 0.01
"""p99: one in a hundred may be slower."""


class NoEvidence(Exception):
    """Evidence can't be had; the message says why."""


class Verdict(Enum):
    """What to do with the canary."""

    PROMOTE = "promote"
    HOLD = "hold"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class Histogram:
    """A latency histogram as Prometheus has it.

    Attributes:
        bounds: upper bounds of the buckets in seconds, ascending, the last one infinite.
        counts: observations in each bucket, not cumulative.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    @property
    def total(self) -> float:
        """All observations."""
        return sum(self.counts)

    def over(self, bound: float) -> float:
        """Observations that may have been over `bound`, itself one of the bounds."""
        return sum(count for upper, count in zip(self.bounds, self.counts, strict=True) if upper > bound)


@dataclass(frozen=True)
class Evidence:
    """What is known of one revision since the canary began.

    Attributes:
        requests: requests that ended, not counting those whose client left.
        errors: those that failed.
        ttft: time to first token.
        itl: time between tokens.
        speeds: output tokens per second of decoding, one value for each step of time, 0 for none.
    """

    requests: float
    errors: float
    ttft: Histogram
    itl: Histogram
    speeds: tuple[float, ...]


@dataclass(frozen=True)
class JudgeSettings:
    """What is good enough, and how sure to be of it.

    Attributes:
        alpha: chance of rolling back a canary that is within the margins, over the whole watch.
        beta: chance of promoting one that is beyond a margin.
        min_requests: of each revision, before anything is said but an obvious failure.
        min_minutes: of traffic before a promotion: some faults need time.
        error_margin: errors may be more frequent by this much.
        latency_margin: p99 may be higher by this share.
        speed_margin: tokens per second may be lower by this share.
    """

    alpha: float = 0.05
    beta: float = 0.05
    min_requests: int = 500
    min_minutes: float = 60.0
    error_margin: float = 0.01
    latency_margin: float = 0.25
    speed_margin: float = 0.15


@dataclass(frozen=True)
class Finding:
    """One measure.

    Attributes:
        verdict: PROMOTE when it is shown to be within the margin, ROLLBACK when beyond, HOLD when neither.
        reason: in words, with figures.
    """

    measure: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Judgement:
    """The whole."""

    verdict: Verdict
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]


MEASURES = 4


def judge(stable: Evidence, canary: Evidence, minutes: float, settings: JudgeSettings) -> Judgement:
    """Roll back when any measure is shown to be beyond its margin; promote when all are shown to be within."""
    alpha = settings.alpha / MEASURES  # any of them can roll back a good one
    findings = (
        _errors(stable, canary, alpha, settings),
        _latency("p99 TTFT", stable.ttft, canary.ttft, alpha, settings),
        _latency("p99 ITL", _gaps(stable), _gaps(canary), alpha, settings),
        _speed(stable, canary, alpha, settings),
    )
    few = min(stable.requests, canary.requests) < settings.min_requests
    bad = tuple(f"{found.measure}: {found.reason}" for found in findings if found.verdict is Verdict.ROLLBACK)
    if bad:
        return Judgement(Verdict.ROLLBACK, bad, findings)
    if few:
        reason = (
            f"{canary.requests:.0f} and {stable.requests:.0f} requests, at least {settings.min_requests} are wanted"
        )
        return Judgement(Verdict.HOLD, (reason,), findings)
    open_ = tuple(f"{found.measure}: {found.reason}" for found in findings if found.verdict is Verdict.HOLD)
    if open_:
        return Judgement(Verdict.HOLD, open_, findings)
    if minutes < settings.min_minutes:
        reason = f"{minutes:.0f} minutes of traffic, at least {settings.min_minutes:.0f} are wanted"
        return Judgement(Verdict.HOLD, (reason,), findings)
    return Judgement(Verdict.PROMOTE, tuple(f"{found.measure}: {found.reason}" for found in findings), findings)


def _errors(stable: Evidence, canary: Evidence, alpha: float, settings: JudgeSettings) -> Finding:
    def bounds(level: float) -> tuple[Interval, Interval]:
        old = proportion(stable.errors, stable.requests, level / 2)
        return old, proportion(canary.errors, canary.requests, level / 2)

    told = f"{_rate(canary.errors, canary.requests)} of requests fail, {_rate(stable.errors, stable.requests)} before"
    old, new = bounds(alpha)
    if new.low > old.high + settings.error_margin:
        return Finding("errors", Verdict.ROLLBACK, told)
    old, new = bounds(settings.beta)
    if new.high < old.low + settings.error_margin:
        return Finding("errors", Verdict.PROMOTE, told)
    return Finding("errors", Verdict.HOLD, f"{told}: not clear yet")


def _latency(name: str, stable: Histogram, canary: Histogram, alpha: float, settings: JudgeSettings) -> Finding:
    """Whether one in a hundred at most is over what stable's p99 allows: that is what a p99 within the margin means.

    Stable's p99 is an estimate, too, so half of the chance of an error is for it: a rollback compares with a bound that
    it is shown to be under, a promotion with the bucket that it is at least in. The more there are over a bound, the
    less is it shown, so that all bounds together are wrong no more often than the one at stable's true p99.
    """
    if not stable.total or not canary.total:
        return Finding(name, Verdict.HOLD, "nothing observed yet")

    def slow(histogram: Histogram, bound: float, level: float) -> int:
        return compared(histogram.over(bound), histogram.total, TAIL, level / 2, expected=TAIL)

    def limit(p99: float) -> float:
        allowed = p99 * (1 + settings.latency_margin)
        return next((bound for bound in canary.bounds if bound >= allowed), math.inf)

    def told(bound: float, p99: str) -> str:
        share = _rate(canary.over(bound), canary.total)
        return f"{share} are over {bound:g} s, which p99 may not be; stable's is {p99}"

    under = next((bound for bound in stable.bounds if slow(stable, bound, alpha) < 0), math.inf)
    if slow(canary, limit(under), alpha) > 0:
        return Finding(name, Verdict.ROLLBACK, told(limit(under), f"under {under:g} s"))
    within = next((bound for bound in stable.bounds if slow(stable, bound, settings.beta) <= 0), math.inf)
    words = told(limit(within), f"up to {within:g} s")
    if limit(within) < math.inf and slow(canary, limit(within), settings.beta) < 0:
        return Finding(name, Verdict.PROMOTE, words)
    return Finding(name, Verdict.HOLD, f"{words}: not clear yet")


def _speed(stable: Evidence, canary: Evidence, alpha: float, settings: JudgeSettings) -> Finding:
    """Step by step of time, so that what slows both counts for neither."""
    pairs = [(new, old) for new, old in zip(canary.speeds, stable.speeds, strict=True) if new > 0 and old > 0]
    ratios = tuple(math.log(new / old) for new, old in pairs)
    margin = math.log(1 - settings.speed_margin)
    if not ratios:
        return Finding("throughput", Verdict.HOLD, "no time in which both served")
    told = f"{math.exp(sum(ratios) / len(ratios)):.2f} of stable's tokens per second, over {len(ratios)} steps of time"
    if mean(ratios, alpha).high < margin:
        return Finding("throughput", Verdict.ROLLBACK, told)
    if mean(ratios, settings.beta).low > margin:
        return Finding("throughput", Verdict.PROMOTE, told)
    return Finding("throughput", Verdict.HOLD, f"{told}: not clear yet")


def _gaps(evidence: Evidence) -> Histogram:
    """Gaps of one request are alike: they count as one piece of evidence for each request, not for each token."""
    gaps = evidence.itl
    weight = min(1.0, evidence.requests / gaps.total) if gaps.total else 1.0
    return Histogram(gaps.bounds, tuple(count * weight for count in gaps.counts))


def _rate(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "none"
