"""Warm every path that a user can take through a worker before it takes traffic.

The first use of a path can be slow: kernels compile, grammars load, NIXL peers shake hands. Each new worker is driven
through the cases below by the front end itself, paired with every worker of the other pool.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm import TokensPrompt
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from runtime.cluster import Cluster
from runtime.fleet import State, Worker
from runtime.policy.types import Disaggregated, Local, Plan

if TYPE_CHECKING:
    from runtime.frontend import FrontEndLLM

logger = logging.getLogger("baton.warmup")

PROMPT = list(range(100, 140))


def cases() -> Iterator[SamplingParams]:
    """One request for each path through an engine that compiles or loads something on first use."""
    final = RequestOutputKind.FINAL_ONLY
    yield SamplingParams(max_tokens=3, temperature=0.0, output_kind=final)
    yield SamplingParams(max_tokens=3, temperature=1.0, top_p=0.9, top_k=20, min_p=0.01, seed=7, output_kind=final)
    yield SamplingParams(
        max_tokens=3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        min_tokens=2,
        output_kind=final,
    )
    yield SamplingParams(max_tokens=3, logprobs=5, logit_bias={1: 1.0}, output_kind=final)
    yield SamplingParams(max_tokens=2, prompt_logprobs=1, output_kind=final)
    for grammar in (StructuredOutputsParams(json={"type": "object"}), StructuredOutputsParams(regex="[a-z]{3}")):
        yield SamplingParams(max_tokens=3, structured_outputs=grammar, output_kind=final)


class Warmer:
    """Follows the fleet and warms each worker that joins it."""

    def __init__(self, llm: FrontEndLLM, cluster: Cluster) -> None:
        self._llm = llm
        self._cluster = cluster
        self._task: asyncio.Task[None] | None = None
        self._count = 0

    def start(self) -> None:
        """Begin to follow the fleet."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def stop(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()

    async def both_pools(self) -> None:
        """Wait until both pools have a warm worker."""
        fleet = self._cluster.fleet
        while not fleet.ready():
            await fleet.changed.wait()

    async def _follow(self) -> None:
        fleet = self._cluster.fleet
        while True:
            changed = fleet.changed
            self._cluster.forget_abandoned()
            for worker in fleet.in_state(State.WARMING):
                try:
                    await self._warm(worker)
                except Exception:  # a worker that can't do the simplest request takes no traffic; the rest goes on
                    logger.exception("worker %s failed its warm-up", worker.link.facts.engine_id)
                    worker.link.close("it failed its warm-up")
            await changed.wait()

    async def _warm(self, worker: Worker) -> None:
        fleet, facts = self._cluster.fleet, worker.link.facts
        started = time.monotonic()
        if facts.role == "decode":
            for params in cases():
                await self._run(Local(facts.engine_id, "warm-up"), params)
        peers = [other.link.facts for other in fleet.in_state(State.READY) if other.link.facts.role != facts.role]
        for peer in peers:
            prefill, decode = (facts, peer) if facts.role == "prefill" else (peer, facts)
            await self._run(Disaggregated(prefill.engine_id, decode.engine_id), next(cases()))
        if worker.link.lost is None and worker.state is State.WARMING:
            fleet.set_state(worker, State.READY)
            logger.info("%s worker %s warmed in %.1f s", facts.role, facts.engine_id, time.monotonic() - started)

    async def _run(self, plan: Plan, params: SamplingParams) -> None:
        self._count += 1
        request_id = f"warm-up-{self._count}"
        self._cluster.pin(request_id, plan)
        prompt = TokensPrompt(prompt_token_ids=PROMPT)
        reasons = [step.outputs[0].finish_reason async for step in self._llm.generate(prompt, params, request_id)]
        if not reasons or reasons[-1] == "error":
            raise RuntimeError(f"warm-up of {plan} failed")
