"""Sequential statistics: bounds that hold at every look, however often one looks and whenever one stops. Pure.

An ordinary confidence interval is right once. A judge that looks every minute and stops at the first significant
difference would roll back a good revision sooner or later. A *confidence sequence* covers the truth at all times at
once with the stated probability, so looking costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """What a quantity lies between."""

    low: float
    high: float


def proportion(hits: float, trials: float, alpha: float) -> Interval:
    """A confidence sequence for a probability, from `hits` of `trials` independent ones: what `compared` can't exclude.

    Args:
        alpha: chance that the truth is ever outside.
    """
    if trials <= 0:
        return Interval(0.0, 1.0)
    hits = min(max(hits, 0.0), trials)
    outside = _excluded(hits, trials, alpha, 0.5)
    middle = hits / trials
    low = 0.0 if not outside(0.0) else _edge(0.0, middle, outside)
    high = 1.0 if not outside(1.0) else _edge(1.0, middle, outside)
    return Interval(low, high)


def compared(hits: float, trials: float, p: float, alpha: float, expected: float = 0.5) -> int:
    """Whether a probability is shown to be under `p` (-1), over it (1), or neither yet (0).

    Args:
        alpha: chance that the wrong one is ever shown.
        expected: about what the probability may be: the nearer, the fewer trials it takes. Any is as safe.
    """
    if trials <= 0:
        return 0
    hits = min(max(hits, 0.0), trials)
    if not _excluded(hits, trials, alpha, expected)(p):
        return 0
    return -1 if hits / trials < p else 1


def _excluded(hits: float, trials: float, alpha: float, expected: float) -> Callable[[float], bool]:
    """Which probabilities are excluded by what was seen.

    The beta-binomial mixture of Robbins (1970): the likelihood averaged over a prior, divided by the likelihood at `p`,
    is a martingale under `p`, so by Ville's inequality it ever reaches 1/alpha with probability alpha at most. The
    values of `p` for which it has are excluded. The prior is Beta(1/2, b) with mean `expected`.
    """
    a, b = 0.5, 0.5 / expected - 0.5
    misses = trials - hits
    bar = _log_beta(hits + a, misses + b) - _log_beta(a, b) + math.log(alpha)
    return lambda p: hits * _log(p) + misses * _log(1 - p) < bar


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


def _edge(outer: float, inner: float, outside: Callable[[float], bool]) -> float:
    """Where `outside` changes between a point that is and one that is not."""
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
