"""The vocabulary of decisions: what a policy sees and what it answers. Plain frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

from runtime.policy.pool import Pool


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of some work as a line over its size: a fixed part, and so much for each unit."""

    fixed_s: float
    each_s: float

    def of(self, units: float) -> float:
        """Seconds for `units` of work."""
        return self.fixed_s + self.each_s * units

    def in_steps(self, steps: int, units: float) -> float:
        """Seconds for `units` of work that is done in so many steps, each of which costs the fixed part."""
        return self.fixed_s * steps + self.each_s * units


UNMEASURED = Cost(0.0, 1e-4)
"""Stands for the prefill cost of a worker without figures, so that tokens can be compared with each other."""


Load = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as a front end sees it at one moment: what it sent itself, and what the worker published.

    What a worker has not published is None; the policy then goes by what this front end sent.
    """

    engine_id: str
    requests: int  # legs in flight from this front end
    tokens: int  # prompt tokens (prefill) or prompt and answer tokens (decode) of those legs

    queued_tokens: int | None = None  # uncached prompt tokens that wait or are being read, of all front ends
    queued_requests: int = 0  # the prompts that those belong to
    streams: int = 0  # requests that write an answer here, or will once their blocks are here
    pulling_tokens: int = 0  # prompt tokens whose blocks are being fetched
    free_blocks: int | None = None  # KV blocks that a request can have, cached ones that nobody holds included
    block_tokens: int = 16
    max_streams: int | None = None  # most requests in one step (`max_num_seqs`)
    max_step_tokens: int | None = None  # most tokens in one step (`max_num_batched_tokens`)
    prefill: Cost | None = None  # reading: fixed part for each step with prompt tokens, and for each uncached token
    step: Cost | None = None  # one decode step: fixed part, and for each stream
    pull: Cost | None = None  # fetching blocks: fixed part for each handoff, and for each token

    # Worked out once, for a view is looked at for many requests:
    waiting_tokens: int = field(init=False, compare=False)  # prompt tokens that come before those of a new request
    backlog_s: float = field(init=False, compare=False)  # seconds until they are read
    room_tokens: float = field(init=False, compare=False)  # longest prompt that there are blocks for
    token_s: float = field(init=False, compare=False)  # to read a token
    step_s: float = field(init=False, compare=False)  # one decode step with one stream more than now; 0: not measured
    load: Load = field(init=False, compare=False)  # orders a pool; coarse, so that workers can be equal

    def __post_init__(self) -> None:
        cost = self.prefill or UNMEASURED
        waiting = self.tokens if self.queued_tokens is None else self.queued_tokens
        backlog_s = cost.in_steps(max(self.queued_requests, self.steps(waiting)), waiting)
        room = inf if self.free_blocks is None else (self.free_blocks - 1) * self.block_tokens
        step_s = self.step.of(self.streams + 1) if self.step else 0.0
        derive = object.__setattr__  # the way of frozen dataclasses
        derive(self, "waiting_tokens", waiting)
        derive(self, "backlog_s", backlog_s)
        derive(self, "room_tokens", room)
        derive(self, "token_s", cost.each_s)
        derive(self, "step_s", step_s)
        derive(self, "load", (int(backlog_s * 100), int(step_s * 1000), self.streams, self.tokens, self.requests))

    def steps(self, tokens: int) -> int:
        """In how many engine steps so many prompt tokens are read."""
        return -(-tokens // self.max_step_tokens) if self.max_step_tokens else min(tokens, 1)


@dataclass(frozen=True)
class Snapshot:
    """The workers that can take work now.

    Plain tuples of views do; `with_view` carries the order by load on to the next snapshot.

    Attributes:
        handoff_s: seconds that a disaggregated request spends in messages between its halves.
    """

    prefill: Pool | tuple[WorkerView, ...]
    decode: Pool | tuple[WorkerView, ...]
    handoff_s: float = 0.0

    def with_view(self, view: WorkerView) -> Snapshot:
        """This snapshot with a newer view of one of its workers (tens of microseconds for 1,000 workers)."""
        prefill, decode = Pool.of(self.prefill), Pool.of(self.decode)
        if view.engine_id in prefill.places:
            return replace(self, prefill=prefill.with_view(view), decode=decode)
        return replace(self, prefill=prefill, decode=decode.with_view(view))


@dataclass(frozen=True)
class RequestView:
    """What a policy may know of a request.

    Attributes:
        cached: prompt tokens that a worker holds, by its id; those with most come first (`kv_transfer.index.Match`).
    """

    prompt_tokens: int
    can_disaggregate: bool = True
    request_id: str = ""  # spreads requests over workers that are equally good
    cached: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RoutingSettings:
    """What a plan may cost, and which plans there are.

    Attributes:
        mode: `adaptive`; `always` disaggregates what can be; `never` runs each request whole, on any worker;
            `round_robin` and `least_loaded` are to compare with (`runtime.policy.baselines`).
        itl_limit_s: longest time between two tokens of a stream, while nothing special happens.
        gap_limit_s: longest single gap between two tokens, when a prompt is read beside the stream.
        borrow: whether an idle worker of one pool does the work of the other.
        behind_s: a prefill pool whose best worker has this much to read is behind.
        shortlist: so many workers of a pool are looked at for their load, and as many for what they hold.
    """

    mode: Literal["adaptive", "always", "never", "round_robin", "least_loaded"] = "adaptive"
    itl_limit_s: float = 0.1
    gap_limit_s: float = 0.2
    borrow: bool = True
    behind_s: float = 0.1
    shortlist: int = 4


PRESETS: dict[str, RoutingSettings] = {
    "latency": RoutingSettings(),
    "throughput": RoutingSettings(itl_limit_s=0.2, gap_limit_s=1.0, behind_s=0.02),
    "always-disaggregated": RoutingSettings(mode="always", borrow=False),
    "never": RoutingSettings(mode="never", itl_limit_s=inf, gap_limit_s=inf, borrow=False),
    "round-robin": RoutingSettings(mode="round_robin", borrow=False),
    "least-loaded": RoutingSettings(mode="least_loaded", borrow=False),
}
"""Settings by name."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a plan is expected to cost.

    Attributes:
        ttft_s: seconds from now to the first token.
        itl_s: seconds between tokens, of this stream and of those beside it.
        gap_s: longest single gap that the plan makes in any stream.
        uncached_tokens: prompt tokens that have to be computed.
        pulled_tokens: prompt tokens whose blocks go from one worker to the other.
        measured: False when a worker of the plan has no figures yet; the seconds then only compare plans.
    """

    ttft_s: float
    itl_s: float
    gap_s: float
    uncached_tokens: int
    pulled_tokens: int
    measured: bool


@dataclass(frozen=True)
class Disaggregated:
    """Prefill on one worker, decode on another."""

    prefill: str
    decode: str
    reason: str = "default"
    predicted: Predicted | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Local:
    """Both halves on one worker."""

    decode: str  # a decode worker, or a borrowed one of the other pool
    reason: str
    predicted: Predicted | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Refused:
    """No plan; a typed reason."""

    reason: str


Plan = Disaggregated | Local
