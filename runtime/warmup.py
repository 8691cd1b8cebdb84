"""Warm every path that a user can take through a worker before it takes traffic.

The first use of a path can be slow: kernels compile, grammars load, NIXL peers shake hands. Each new worker is driven
through the cases below by the front end itself, paired with every worker of the other pool.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm import TokensPrompt
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from runtime.cluster import Cluster
from runtime.policy.types import Disaggregated, Local, Plan
from runtime.worker import State, Worker

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


PAIR_TIMEOUT_S = 60.0
"""Longest wait for one request of a pair: a sick peer must not keep a healthy worker from its traffic."""

LONGEST_PAUSE_S = 30.0


class Warmer:
    """Follows the fleet and warms each worker that joins it, or that was set aside after failures."""

    def __init__(self, llm: FrontEndLLM, cluster: Cluster) -> None:
        self._llm = llm
        self._cluster = cluster
        self._task: asyncio.Task[None] | None = None
        self._warming: dict[Worker, asyncio.Task[None]] = {}
        self._pairing = asyncio.Lock()  # so that two new workers don't miss each other

    def start(self) -> None:
        """Begin to follow the fleet."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def stop(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
        for task in self._warming.values():
            task.cancel()

    async def both_pools(self) -> None:
        """Wait until both pools have a warm worker."""
        fleet = self._cluster.fleet
        while not fleet.ready():
            await fleet.changed.wait()

    async def _follow(self) -> None:
        fleet = self._cluster.fleet
        while True:
            changed = fleet.changed
            for worker in fleet.in_state(State.WARMING):
                if worker not in self._warming:
                    task = asyncio.get_running_loop().create_task(self._bring_up(worker))
                    self._warming[worker] = task
                    task.add_done_callback(functools.partial(self._forget, worker))
            await changed.wait()

    def _forget(self, worker: Worker, _: asyncio.Task[None]) -> None:
        self._warming.pop(worker, None)

    async def _bring_up(self, worker: Worker) -> None:
        """Warm a worker, again and again until it works or is gone; it takes no traffic before."""
        facts, pause_s = worker.link.facts, 0.5
        while worker.link.lost is None and worker.state is State.WARMING:
            try:
                await self._warm(worker)
                return
            except Exception as error:  # whatever it was, the answer is to try again later
                logger.warning("%s worker %s failed its warm-up: %s", facts.role, facts.engine_id, error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _warm(self, worker: Worker) -> None:
        fleet, facts = self._cluster.fleet, worker.link.facts
        started = time.monotonic()
        # A prefill worker may have to write an answer when no decode worker is left.
        for params in cases() if facts.role == "decode" else [next(cases())]:
            await self._run(Local(facts.engine_id, "warm-up"), params)
        async with self._pairing:
            await self._meet_peers(worker)
            if worker.link.lost is None and worker.state is State.WARMING:
                fleet.set_state(worker, State.READY)
        logger.info("%s worker %s warmed in %.1f s", facts.role, facts.engine_id, time.monotonic() - started)

    async def _meet_peers(self, worker: Worker) -> None:
        """Run a request through each pair with the other pool; one that works is enough."""
        facts = worker.link.facts
        problem: Exception | None = None
        met = False
        for peer in self._cluster.fleet.links("decode" if facts.role == "prefill" else "prefill"):
            pair = (facts, peer.facts) if facts.role == "prefill" else (peer.facts, facts)
            try:
                async with asyncio.timeout(PAIR_TIMEOUT_S):
                    await self._run(Disaggregated(pair[0].engine_id, pair[1].engine_id), next(cases()))
                met = True
            except (RuntimeError, TimeoutError) as error:
                problem = error
        if problem is not None and not met:
            raise problem

    async def _run(self, plan: Plan, params: SamplingParams) -> None:
        request_id = f"warm-up-{uuid.uuid4().hex}"  # nobody can guess it and so take the pinned plan for a request
        self._cluster.pin(request_id, plan)
        prompt = TokensPrompt(prompt_token_ids=PROMPT)
        reasons = [step.outputs[0].finish_reason async for step in self._llm.generate(prompt, params, request_id)]
        if not reasons or reasons[-1] == "error":
            raise RuntimeError(f"{plan} failed")
