"""What a request would cost on a worker: its first half, its second half, or all of it.

Seconds are predicted from what waits there, from the part of the prompt that is not cached there, and from the
worker's measured costs. Engines read prompts in steps of at most `max_step_tokens`, first come first served, and every
stream beside them waits for such a step: that is the gap that a prompt makes.
"""

from __future__ import annotations

from typing import NamedTuple

from runtime.policy.types import UNMEASURED, Cost, RequestView, RoutingSettings, WorkerView

FREE = Cost(0.0, 0.0)
"""Stands for a cost that was not measured."""

NO_ROOM = 1000.0
"""The excess of a worker without blocks or places for the request: worse than any slowness."""


class Share(NamedTuple):
    """A worker's share of a request: a half, or the whole. (A tuple: dozens are made for each request.)"""

    worker: WorkerView
    cached: int  # prompt tokens that the worker holds
    seconds: float  # from the start of this share to the first token (reading: to its end)
    itl_s: float  # time between tokens of the streams there, this one included
    gap_s: float  # longest single gap that it makes or suffers there
    excess: float  # how far over the limits, as a part of the limit; 0 is within


def read(worker: WorkerView, request: RequestView, settings: RoutingSettings) -> Share:
    """The prompt on a worker whose blocks go elsewhere."""
    cached, uncached = _split(worker, request)
    seconds, gap_s = _reading(worker, uncached, worker.streams)
    excess = _over(gap_s, settings.gap_limit_s) + _no_room(worker, request, 0)
    return Share(worker, cached, seconds, 0.0, gap_s, excess)


def write(worker: WorkerView, request: RequestView, settings: RoutingSettings) -> Share:
    """The answer on a worker that fetches the blocks it lacks. Its first step may have a prompt of others in it."""
    cached, uncached = _split(worker, request)
    itl_s = (worker.step or FREE).of(worker.streams + 1)
    gap_s = itl_s + _chunk_s(worker, worker.queued_tokens or 0)
    pull = worker.pull or FREE
    seconds = pull.of(worker.pulling_tokens + uncached) + gap_s
    excess = max(_over(itl_s, settings.itl_limit_s), _over(gap_s, settings.gap_limit_s)) + _no_room(worker, request, 1)
    return Share(worker, cached, seconds, itl_s, gap_s, excess)


def whole(worker: WorkerView, request: RequestView, settings: RoutingSettings, beside: int) -> Share:
    """All of a request on one worker, while so many streams are there or may come.

    Reading that takes longer than one gap may be is the time between tokens for a while, and has to keep that limit.
    """
    cached, uncached = _split(worker, request)
    seconds, gap_s = _reading(worker, uncached, beside)
    itl_s = (worker.step or FREE).of(worker.streams + 1)
    if seconds > settings.gap_limit_s:
        itl_s = max(itl_s, gap_s)
    excess = max(_over(itl_s, settings.itl_limit_s), _over(gap_s, settings.gap_limit_s)) + _no_room(worker, request, 1)
    return Share(worker, cached, seconds, itl_s, gap_s, excess)


def _split(worker: WorkerView, request: RequestView) -> tuple[int, int]:
    """Cached and uncached tokens of the prompt; the last token is always computed."""
    cached = min(request.cached.get(worker.engine_id, 0), request.prompt_tokens - 1) if request.cached else 0
    return cached, request.prompt_tokens - cached


def _reading(worker: WorkerView, uncached: int, beside: int) -> tuple[float, float]:
    """Seconds until the prompt is read here, and the longest gap that this makes in so many streams."""
    cost = worker.prefill or UNMEASURED
    seconds = worker.backlog_s + cost.of(uncached)
    if not beside:
        return seconds, 0.0
    tokens = worker.waiting_tokens + uncached
    step_s = (worker.step or FREE).of(beside)
    if worker.streams:
        seconds += step_s * (-(-tokens // worker.max_step_tokens) if worker.max_step_tokens else 1)
    return seconds, step_s + _chunk_s(worker, tokens)


def _chunk_s(worker: WorkerView, tokens: int) -> float:
    """What one step takes longer for the prompt tokens in it."""
    return (worker.prefill or UNMEASURED).each_s * min(tokens, worker.max_step_tokens or tokens)


def _over(value_s: float, limit_s: float) -> float:
    return value_s / limit_s - 1.0 if value_s > limit_s else 0.0


def _no_room(worker: WorkerView, request: RequestView, streams: int) -> float:
    """The excess for lack of blocks, and of places for so many more streams."""
    excess = 0.0
    if worker.free_blocks is not None:
        missing = request.prompt_tokens // worker.block_tokens + 1 - worker.free_blocks
        excess += NO_ROOM + missing if missing > 0 else 0.0
    if worker.max_streams is not None and worker.streams + streams > worker.max_streams:
        excess += NO_ROOM + worker.streams
    return excess
