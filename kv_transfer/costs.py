"""What a worker's work costs, learned while it works: seconds as a line over size.

Each line starts from a self-measurement and follows what is observed since. It is a least-squares line over relative
errors (a millisecond matters more in a short step than in a long one), with old observations fading, and with an
observation that is far off counted as not quite so far off: one hiccup hardly moves the line, a lasting change does
within some tens of observations. Plain arithmetic on what is passed in: no clock, no randomness.

Learned where the work is done, by the worker: it sees every step, and all front ends are told the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MEMORY = 64.0
"""An observation counts 1/e after so many others."""

FAR = 3.0
"""An observation further off than so many times the usual error is an outlier."""

ERROR_MEMORY = 16.0
"""As `MEMORY`, for the usual error: shorter, so that what was an outlier is soon believed when it goes on."""

FIRST_ERROR = 0.5
"""The usual error of a fresh self-measurement: its line is quick to change at first."""

LEAST_ERROR = 0.05
"""The usual error is taken to be at least this, as a part of what was predicted."""

LEAST_S = 1e-7
"""Nothing takes less."""

SEED_WEIGHT = 8.0
"""So many observations is the self-measurement worth."""


SMALL_TOKENS = 16
"""A step with fewer prompt tokens says nothing of the time to read one (a pulled prompt's last token is computed)."""


class Cost(NamedTuple):
    """Seconds of some work as a line over its size. The policy's record of the same name is its own: it imports
    nothing."""

    fixed_s: float
    each_s: float

    def of(self, units: float) -> float:
        """Seconds for `units` of work."""
        return self.fixed_s + self.each_s * units


class Line:
    """Seconds = fixed + each · size, both at least 0, from observations.

    Args:
        seed: size and seconds of self-measurements; at least one. Of one size only, all of it is taken to grow with
            the size.
        memory: see `MEMORY`.

    Raises:
        ValueError: no seed, or one without time.
    """

    def __init__(self, seed: Sequence[tuple[float, float]], memory: float = MEMORY) -> None:
        if not seed or any(size <= 0 or seconds < LEAST_S for size, seconds in seed):
            raise ValueError(f"a line starts from measurements of some size that took some time, not {seed!r}")
        self._keep = 1.0 - 1.0 / memory
        self._error = FIRST_ERROR  # decayed mean of relative errors
        self._sums = [0.0] * 5  # of the weights, and weighted by them: size, seconds, size², size · seconds
        self.cost = Cost(0.0, sum(seconds for _, seconds in seed) / sum(size for size, _ in seed))
        for size, seconds in seed:
            self._add(size, seconds, SEED_WEIGHT / len(seed))
        self._fit()

    def observe(self, size: float, seconds: float) -> None:
        """Take in a piece of work that was done. What can't be (no time, a size below 0) is ignored."""
        if size < 0 or seconds < LEAST_S:
            return
        expected = max(self.cost.of(size), LEAST_S)
        error = seconds / expected - 1.0
        far = FAR * max(self._error, LEAST_ERROR)
        self._error += (min(abs(error), 2.0 * far) - self._error) / ERROR_MEMORY
        near = expected * max(0.25, 1.0 + max(-far, min(far, error)))
        self._sums = [value * self._keep for value in self._sums]
        self._add(size, near, 1.0)
        self._fit()

    def _add(self, size: float, seconds: float, weight: float) -> None:
        weight /= seconds**2
        for place, value in enumerate((1.0, size, seconds, size * size, size * seconds)):
            self._sums[place] += weight * value

    def _fit(self) -> None:
        n, x, y, xx, xy = self._sums
        spread = xx * n - x * x
        if spread < 1e-4 * x * x:  # all of about one size: keep the line's shape, move it up or down
            scale = y / (self.cost.fixed_s * n + self.cost.each_s * x)
            self.cost = Cost(self.cost.fixed_s * scale, self.cost.each_s * scale)
            return
        each = (n * xy - x * y) / spread
        fixed = (y - each * x) / n
        if fixed < 0:
            fixed, each = 0.0, xy / xx
        elif each < 0:
            fixed, each = y / n, 0.0
        self.cost = Cost(fixed, each)


class WorkerCosts:
    """The costs of one worker, from what it sees itself do. Each is None until there is a first observation."""

    def __init__(self) -> None:
        self._prefill: Line | None = None
        self._step: Line | None = None
        self._pull: Line | None = None

    @property
    def prefill(self) -> Cost | None:
        """Reading prompts: for each step with prompt tokens in it, and for each token."""
        return self._prefill.cost if self._prefill else None

    @property
    def step(self) -> Cost | None:
        """A decode step: for each step, and for each stream in it."""
        return self._step.cost if self._step else None

    @property
    def pull(self) -> Cost | None:
        """Fetching the blocks of a handoff: for each handoff, and for each token."""
        return self._pull.cost if self._pull else None

    def seed(self, prompts: Sequence[tuple[float, float]], steps: Sequence[tuple[float, float]]) -> None:
        """Start from a self-measurement: tokens and seconds of prompts, streams and seconds of steps."""
        self._prefill = Line(prompts)
        self._step = Line(steps)

    def saw_step(self, seconds: float, prompt_tokens: int, streams: int) -> None:
        """An engine step: so many prompt tokens were read in it, and so many streams got a token.

        In a step of both kinds the decode part is taken as known, and what is left goes to the prompt tokens.
        """
        if prompt_tokens < SMALL_TOKENS:
            if streams:
                self._step = _observed(self._step, streams, seconds)
            return
        decode_s = self._step.cost.of(streams) if streams and self._step is not None else 0.0
        self._prefill = _observed(self._prefill, prompt_tokens, seconds - decode_s)

    def saw_pull(self, seconds: float, tokens: int) -> None:
        """A handoff whose blocks were fetched, with no other on its way. The first is taken to be all fixed part."""
        if self._pull is None and tokens > 1 and seconds > LEAST_S:
            self._pull = Line([(1, seconds), (tokens, seconds)])
        elif self._pull is not None:
            self._pull.observe(tokens, seconds)


def _observed(line: Line | None, size: float, seconds: float) -> Line | None:
    if line is None:
        return Line([(size, seconds)]) if seconds > LEAST_S else None
    line.observe(size, seconds)
    return line
