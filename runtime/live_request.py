"""What the cluster keeps of a request that is under way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreRequest

from decode.request import without_engine_args
from decode.resume import resume
from kv_transfer.handoff import Handoff
from runtime.adapters import numbered
from runtime.client_view import StreamClock
from runtime.policy.types import Plan
from runtime.visit import Visit


@dataclass(eq=False)
class LiveRequest:
    """A request from its arrival until its last token."""

    request: EngineCoreRequest
    pinned: Plan | None = None
    visit: Visit = field(default_factory=Visit)
    clock: StreamClock | None = None  # None for a warm-up, which no client sees
    handoff: Handoff | None = None
    made: list[int] = field(default_factory=list)  # tokens that went to the client
    losses: int = 0
    failed_pulls: int = 0
    legs: int = 0
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def id(self) -> str:
        """vLLM's internal request id."""
        return self.request.request_id

    def remaining(self) -> EngineCoreRequest:
        """What is left to do: the request itself, or its continuation after the tokens that were made."""
        return resume(self.request, self.made) if self.made else self.request


def trusted(request: EngineCoreRequest) -> EngineCoreRequest:
    """`request` without what a client may not decide: KV parameters, the engine's rank, hints, an adapter's number."""
    if request.sampling_params is not None:
        request.sampling_params = without_engine_args(request.sampling_params)
    request.data_parallel_rank = None
    request.client_index = request.current_wave = 0
    request.kv_hints = None
    if request.lora_request is not None:
        request.lora_request = numbered(request.lora_request)
    return request
