"""What a worker holds and how fast it works, as it tells every front end a few times a second.

`Meter` counts what the worker sees pass: legs that come, engine steps, legs that end. It reads vLLM's own records only
(`SchedulerStats` with its iteration details, `PrefillStats`), so that real and simulated engines are metered alike.
Figures are rounded: a worker whose load is about the same has no news, and an idle one says nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kv_transfer.costs import LEAST_S, Cost, WorkerCosts
from kv_transfer.handoff import kv_params

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

PERIOD_S = 0.1
"""How often a worker looks whether it has news."""

COARSE_TOKENS = 32
"""Token counts are rounded up to multiples of this."""

COARSE_BLOCKS = 64
"""Free blocks are rounded down to such a part of all blocks."""

COARSE_COST = 1.05
"""Costs are rounded to powers of this."""

NEEDED_TOKENS = "needed_tokens"
"""What `Meter.needed_tokens` is called on its way to Ray Serve's controller."""

HIT_HALF_LIFE_S = 300.0
"""What the prefix cache spared counts half after this long, for how much its KV is needed."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker holds at one moment, of all front ends together.

    Attributes:
        queued_tokens: uncached prompt tokens that wait or are being read, less what was probably read of the step that
            is under way.
        queued_requests: the prompts that those belong to.
        streams: requests that write an answer here, or will once their prompt is here.
        pulling_tokens: prompt tokens whose blocks are being fetched.
        free_blocks: KV blocks that a request can have, cached ones that nobody holds included; None before any step.
        prefill: reading: seconds for each step with prompt tokens and for each token. As below None if unmeasured.
        step: a decode step: seconds for each step and for each stream.
        pull: fetching blocks: seconds for each handoff and for each token.
    """

    queued_tokens: int = 0
    queued_requests: int = 0
    streams: int = 0
    pulling_tokens: int = 0
    free_blocks: int | None = None
    prefill: Cost | None = None
    step: Cost | None = None
    pull: Cost | None = None


@dataclass(frozen=True, slots=True)
class News:
    """A worker's load, to one front end.

    Attributes:
        legs: so many legs of this front end had come when the load was taken.
    """

    load: Load
    legs: int


@dataclass(slots=True)
class _Leg:
    """A leg in the engine."""

    tokens: int  # to be read, or fetched
    prompt: int
    pulls: bool
    writes: bool
    begun_at: float
    alone: bool  # no other pull was on its way when this one began
    begun: bool = False  # its prompt is here


class Meter:
    """Counts the legs of one engine and learns what its work costs.

    Args:
        num_blocks: KV blocks of the engine.
        max_step_tokens: most tokens in one of its steps; 0 if nobody knows.
    """

    def __init__(self, num_blocks: int, max_step_tokens: int = 0) -> None:
        self.costs = WorkerCosts()
        self._num_blocks = num_blocks
        self._max_step_tokens = max_step_tokens
        self._step_began = 0.0
        self._legs: dict[str, _Leg] = {}
        self._read = 0  # prompt tokens read of legs whose reading has not ended
        self._free_blocks: int | None = None
        self._hits = (0.0, 0.0)  # prompt tokens that were found in the cache, faded; and when that was worked out

    def took(self, request: EngineCoreRequest, tokens: int | None, now: float) -> None:
        """A leg was given to the engine.

        Args:
            tokens: how many of its prompt tokens are not expected in the engine's cache; all when nobody knows.
            now: seconds on a monotonic clock, the same as for `stepped`.
        """
        kv = kv_params(request)
        prompt = len(request.prompt_token_ids or ())
        pulls = bool(kv.get("do_remote_prefill"))
        if not any(leg.begun or not leg.pulls for leg in self._legs.values()):  # else it is in the middle of a step
            self._step_began = now
        self._legs[request.request_id] = _Leg(
            tokens=prompt if tokens is None else max(0, min(tokens, prompt)),
            prompt=prompt,
            pulls=pulls,
            writes=not kv.get("do_remote_decode"),
            begun_at=now,
            alone=pulls and not any(leg.pulls and not leg.begun for leg in self._legs.values()),
        )

    def stepped(self, outputs: EngineCoreOutputs, now: float) -> None:
        """The engine has made a step."""
        self._step_began = now
        stats = outputs.scheduler_stats
        if stats is not None:
            self._free_blocks = int((1.0 - stats.kv_cache_usage) * self._num_blocks)
            if (step := stats.iteration_details) is not None:
                self._read += step.num_ctx_tokens
                streams = step.num_generation_requests
                self.costs.saw_step(max(step.elapsed_ms / 1000.0, 2 * LEAST_S), step.num_ctx_tokens, streams)
        for output in outputs.outputs:
            leg = self._legs.get(output.request_id)
            if leg is not None and not leg.begun:
                self._begin(leg, output.prefill_stats.num_computed_tokens if output.prefill_stats else 0, now)
                if output.prefill_stats is not None:
                    self._hits = (self._faded(now) + output.prefill_stats.num_local_cached_tokens, now)
            if output.finished:
                self.dropped(output.request_id)

    def dropped(self, leg_id: str) -> None:
        """A leg has ended or was aborted."""
        self._legs.pop(leg_id, None)
        if not any(not leg.begun and not leg.pulls for leg in self._legs.values()):
            self._read = 0

    def load(self, now: float) -> Load:
        """What the engine holds now, rounded."""
        legs = self._legs.values()
        reading = [leg.tokens for leg in legs if not leg.begun and not leg.pulls]
        unread = max(0, sum(reading) - self._read)
        return Load(
            queued_tokens=_coarse(unread - self._read_in_this_step(unread, now)),
            queued_requests=len(reading),
            streams=sum(leg.writes for leg in legs),
            pulling_tokens=_coarse(sum(leg.tokens for leg in legs if leg.pulls and not leg.begun)),
            free_blocks=None if self._free_blocks is None else _coarse_blocks(self._free_blocks, self._num_blocks),
            prefill=_coarse_cost(self.costs.prefill),
            step=_coarse_cost(self.costs.step),
            pull=_coarse_cost(self.costs.pull),
        )

    def needed_tokens(self, now: float) -> float:
        """Tokens whose KV is needed here: prompts of the legs that are here, and what the cache spared lately."""
        return sum(leg.prompt for leg in self._legs.values()) + self._faded(now)

    def _read_in_this_step(self, unread: int, now: float) -> int:
        """How many tokens the engine has probably read since its last step, to be told of at the end of this one.

        A step of thousands of tokens takes seconds on a CPU. Not all of them, however long it takes.
        """
        if self.costs.prefill is None or not unread:
            return 0
        in_step = min(unread, self._max_step_tokens or unread)
        whole_s = self.costs.prefill.of(in_step)
        return int(in_step * min(0.9, (now - self._step_began) / whole_s)) if whole_s > 0 else 0

    def _faded(self, now: float) -> float:
        hits, at = self._hits
        return hits * 0.5 ** ((now - at) / HIT_HALF_LIFE_S)

    def _begin(self, leg: _Leg, computed: int, now: float) -> None:
        """The first output of a leg: its prompt is here, and one step was made with it."""
        leg.begun = True
        if not leg.pulls:
            self._read = max(0, self._read - max(computed, 1))
        elif leg.alone:
            step = self.costs.step
            streams = sum(other.writes and other.begun for other in self._legs.values())
            self.costs.saw_pull(now - leg.begun_at - (step.of(streams) if step else 0.0), leg.tokens)


def _coarse(tokens: int) -> int:
    return -(-tokens // COARSE_TOKENS) * COARSE_TOKENS


def _coarse_blocks(free: int, total: int) -> int:
    part = max(1, total // COARSE_BLOCKS)
    return free // part * part


def _coarse_cost(cost: Cost | None) -> Cost | None:
    return None if cost is None else Cost(_coarse_seconds(cost.fixed_s), _coarse_seconds(cost.each_s))


def _coarse_seconds(seconds: float) -> float:
    if seconds < LEAST_S / 100:
        return 0.0
    return float(f"{COARSE_COST ** round(math.log(seconds, COARSE_COST)):.3g}")
