"""Sequential statistics: bounds that hold at every look, however often one looks and whenever one stops. Pure.

An ordinary confidence interval is right once. A judge that looks every minute and stops at the first significant
difference would roll back a good revision sooner or later. A *confidence sequence* covers the truth at all times at
once with the stated probability, so looking costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """What a quantity lies between."""

    low: float
    high: float


def proportion(hits: float, trials: float, alpha: float) -> Interval:
    """A confidence sequence for a probability, from `hits` of `trials` independent ones.

    The beta-binomial mixture of Robbins (1970): the likelihood averaged over a prior, divided by the likelihood at `p`,
    is a martingale under `p`, so by Ville's inequality it ever reaches 1/alpha with probability alpha at most. The
    values of `p` for which it has not are the interval.

    Args:
        alpha: chance that the truth is ever outside.
    """
    if trials <= 0:
        return Interval(0.0, 1.0)
    hits = min(max(hits, 0.0), trials)
    misses = trials - hits
    mixture = _log_beta(hits + 0.5, misses + 0.5) - _log_beta(0.5, 0.5)
    bar = mixture + math.log(alpha)

    def outside(p: float) -> bool:
        return hits * _log(p) + misses * _log(1 - p) < bar

    middle = hits / trials
    low = 0.0 if not outside(0.0) else _edge(0.0, middle, outside)
    high = 1.0 if not outside(1.0) else _edge(1.0, middle, outside)
    return Interval(low, high)


def mean(values: tuple[float, ...], alpha: float, expected: int = 60) -> Interval:
    """A confidence sequence for the mean of independent values whose spread is estimated from them.

    The normal mixture of Robbins with a plugged-in variance: asymptotically valid (Waudby-Smith and others, 2021), so
    it says nothing before there are some values.

    Args:
        expected: about how many values it is to be tightest at.
    """
    count = len(values)
    if count < MIN_VALUES:
        return Interval(-math.inf, math.inf)
    centre = sum(values) / count
    spread = math.sqrt(sum((value - centre) ** 2 for value in values) / (count - 1))
    look = max(-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1), 1e-9)
    rho = look / expected  # the mixture's precision that is best at `expected` values
    width = spread * math.sqrt(
        (2 * (count * rho + 1) / (count**2 * rho)) * math.log(math.sqrt(count * rho + 1) / alpha)
    )
    return Interval(centre - width, centre + width)


MIN_VALUES = 30


def _edge(outer: float, inner: float, outside: object) -> float:
    """Where `outside` changes between a point that is and one that is not."""
    assert callable(outside)
    for _ in range(60):
        half = (outer + inner) / 2
        if outside(half):
            outer = half
        else:
            inner = half
    return outer


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log(p: float) -> float:
    return math.log(p) if p > 0 else -1e300
