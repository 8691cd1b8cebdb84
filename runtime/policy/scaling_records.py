"""The vocabulary of scaling: what `scaling.scale` sees, remembers and answers. Plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.policy.demand import DemandSettings, PoolLoad

REASONS = {
    "steady": "the number fits the load",
    "minimum": "the settings ask for so many at least",
    "maximum": "the load asks for more than the settings allow",
    "arrivals": "prompts arrive faster than fewer workers could read them",
    "backlog": "queued prompts would wait too long",
    "queue_depth": "too many requests wait for each worker",
    "tokens": "fewer workers could not write so many tokens a second within the objective",
    "streams": "there are more streams than fit on fewer workers within the objective",
    "kv_guard": "KV blocks run out",
    "ttft": "the time to first token is over its objective, and prompts wait for this pool",
    "itl": "the time between tokens is over its objective, and streams crowd this pool",
    "ratio": "the ratio of prefill to decode workers would leave its band",
    "budget": "the other pool needs the GPUs more",
    "borrowing": "too few, but the other pool helps for now",
    "waits_for_decode": "prompts wait, but for decode workers to pull what is read",
    "cooling": "too many, kept for a while in case the load comes back",
    "draining": "too many, but workers that leave have not finished",
    "shrinking": "the load has been small for long enough",
    "idle": "nothing to do for long enough: down to the minimum",
    "waking": "there is work and no worker",
}
"""Why a pool gets so many workers: all labels there are, and what they mean."""


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """The settings of one pool."""

    least: int = 1
    most: int = 1
    gpus: int = 0  # of a worker


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """What the pools may cost and how quickly they change.

    Attributes:
        budget_gpus: GPUs that both pools may have together. None: what the bounds allow.
        ratio: least and most prefill workers for each decode worker.
        borrow_s: how long the other pool helps before a pool grows.
        shrink_after_s: how long a pool has to be too large before it shrinks by a quarter.
        idle_s: how long there has to be nothing to do before pools go to their minimum, which may be zero.
        settle_s: after a change the measured latencies are looked at again after this time: their window.
    """

    prefill: PoolBounds = PoolBounds()
    decode: PoolBounds = PoolBounds()
    demand: DemandSettings = field(default_factory=DemandSettings)
    budget_gpus: int | None = None
    ratio: tuple[float, float] | None = None
    borrow_s: float = 5.0
    shrink_after_s: float = 120.0
    idle_s: float = 300.0
    settle_s: float = 60.0


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """Both pools at one moment.

    Attributes:
        at_s: a clock that never goes back.
        waiting: requests that wait in the front ends because no worker can take them.
        ttft_s, itl_s: what clients measured lately, at the objectives' percentile. None without traffic.
    """

    at_s: float
    prefill: PoolLoad
    decode: PoolLoad
    waiting: int = 0
    ttft_s: float | None = None
    itl_s: float | None = None

    @property
    def idle(self) -> bool:
        """Nothing to do anywhere."""
        return self.prefill.idle and self.decode.idle and not self.waiting


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What was decided for a pool before. Times are of `FleetLoad.at_s`."""

    workers: int
    patience_s: float
    changed_s: float
    shrunk_s: float | None = None
    short_since_s: float | None = None  # since when there are too few workers
    over_since_s: float | None = None  # since when there are too many
    peak: int = 0  # what would have been needed at most since then


@dataclass(frozen=True, slots=True)
class Memory:
    """What was decided before: given back as it was to the next decision."""

    prefill: PoolMemory
    decode: PoolMemory
    idle_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class PoolAnswer:
    """How many workers a pool should have, and why."""

    workers: int
    reason: str  # one of `REASONS`
    why: str  # in words, with the figures


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer for both pools."""

    prefill: PoolAnswer
    decode: PoolAnswer
