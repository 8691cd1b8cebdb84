"""What a request would cost on a worker: its first half, its second half, or all of it.

Seconds are predicted from what waits there, from the part of the prompt that is not cached there, and from the
worker's measured costs. Engines read prompts in steps of at most `max_step_tokens`, first come first served, and every
stream beside them waits for such a step: that is the gap that a prompt makes.

`tokens` are those of the prompt; `cached` says how many of them the worker need not compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.policy.types import UNMEASURED, Cost, RoutingSettings, WorkerView

FREE = Cost(0.0, 0.0)
"""Stands for a cost that was not measured."""

NO_ROOM = 1000.0
"""The excess of a worker without blocks or places for the request: worse than any slowness."""


@dataclass(slots=True, eq=False)
class Share:
    """A worker's share of a request: a half, or the whole.

    Not frozen: more than ten are made for each request, and freezing one takes as long as predicting it.
    """

    worker: WorkerView
    cached: int  # prompt tokens that the worker holds
    seconds: float  # from the start of this share to the first token (reading: to its end)
    itl_s: float  # time between tokens of the streams there, this one included
    gap_s: float  # longest single gap that it makes or suffers there
    excess: float  # how far over the limits, as a part of the limit; 0 is within

    @property
    def no_room(self) -> bool:
        """Whether blocks or places are missing."""
        return self.excess >= NO_ROOM


def read(worker: WorkerView, tokens: int, cached: int, settings: RoutingSettings) -> Share:
    """The prompt on a worker whose blocks go elsewhere. It needs blocks, but no place among the streams."""
    seconds, gap_s = _reading(worker, tokens - cached, worker.streams)
    excess = gap_s / settings.gap_limit_s - 1.0 if gap_s > settings.gap_limit_s else 0.0
    if tokens > worker.room_tokens:
        excess += NO_ROOM + tokens - worker.room_tokens
    return Share(worker, cached, seconds, 0.0, gap_s, excess)


def write(worker: WorkerView, tokens: int, cached: int, settings: RoutingSettings) -> Share:
    """The answer on a worker that fetches the blocks it lacks. Its first step may have a prompt of others in it."""
    pull = worker.pull or FREE
    itl_s = gap_s = worker.step_s
    if worker.queued_tokens:
        gap_s += _chunk_s(worker, worker.queued_tokens)
    seconds = pull.fixed_s + pull.each_s * (worker.pulling_tokens + tokens - cached) + gap_s
    return Share(worker, cached, seconds, itl_s, gap_s, _excess(worker, tokens, settings, itl_s, gap_s))


def whole(worker: WorkerView, tokens: int, cached: int, settings: RoutingSettings, beside: int) -> Share:
    """All of a request on one worker, while so many streams are there or may come.

    Reading that takes longer than one gap may be is the time between tokens for a while, and has to keep that limit.
    """
    seconds, gap_s = _reading(worker, tokens - cached, beside)
    itl_s = worker.step_s
    if seconds > settings.gap_limit_s and gap_s > itl_s:
        itl_s = gap_s
    return Share(worker, cached, seconds, itl_s, gap_s, _excess(worker, tokens, settings, itl_s, gap_s))


def alone(worker: WorkerView, tokens: int, cached: int, settings: RoutingSettings) -> Share:
    """All of a request on a worker, with the streams that are there now."""
    return whole(worker, tokens, cached, settings, worker.streams)


def alone_beside(worker: WorkerView, tokens: int, cached: int, settings: RoutingSettings) -> Share:
    """All of a request on a decode worker: one without streams may get a stream while it reads."""
    return whole(worker, tokens, cached, settings, worker.streams or 1)


def alone_idle(worker: WorkerView, tokens: int, cached: int, settings: RoutingSettings) -> Share:
    """All of a request on a worker that has no streams and is to get none meanwhile."""
    return whole(worker, tokens, cached, settings, 0)


def reading_s(share: Share, tokens: int) -> float:
    """For how long a prompt alone, without what waits before it, is read beside the streams of the share's worker."""
    worker, uncached = share.worker, tokens - share.cached
    steps = worker.steps(uncached)
    return (worker.prefill or UNMEASURED).in_steps(steps, uncached) + worker.step_s * steps


def _reading(worker: WorkerView, uncached: int, beside: int) -> tuple[float, float]:
    """Seconds until the prompt is read here, and the longest gap that this makes in so many streams."""
    tokens = worker.waiting_tokens + uncached
    steps = worker.steps(tokens)
    own_steps = max(1, steps - worker.steps(worker.waiting_tokens))
    seconds = worker.backlog_s + (worker.prefill or UNMEASURED).in_steps(own_steps, uncached)
    step = worker.step or FREE
    step_s = step.fixed_s + step.each_s * beside
    if beside and worker.streams:
        seconds += step_s * steps
    return seconds, step_s + _chunk_s(worker, tokens) if beside else 0.0


def _chunk_s(worker: WorkerView, tokens: int) -> float:
    """What one step takes longer for the prompt tokens in it."""
    most = worker.max_step_tokens
    return (worker.prefill or UNMEASURED).of(most if most and most < tokens else tokens)


def _excess(worker: WorkerView, tokens: int, settings: RoutingSettings, itl_s: float, gap_s: float) -> float:
    """How far over the limits a worker that writes the answer would be."""
    excess = itl_s / settings.itl_limit_s - 1.0 if itl_s > settings.itl_limit_s else 0.0
    if gap_s > settings.gap_limit_s:
        excess = max(excess, gap_s / settings.gap_limit_s - 1.0)
    if tokens > worker.room_tokens:
        excess += NO_ROOM + tokens - worker.room_tokens
    if worker.max_streams is not None and worker.streams >= worker.max_streams:
        excess += NO_ROOM + worker.streams
    return excess
