"""A short self-measurement of an engine before it takes traffic: what its first costs are predicted from."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from typing import TYPE_CHECKING

from kv_transfer.costs import LEAST_S, WorkerCosts

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

    from kv_transfer.engine import Engine

logger = logging.getLogger("baton.worker")

PROMPTS = (24, 512)
"""Tokens of the prompts that are read; an engine whose steps are smaller reads a third of a step and a whole one."""

STREAMS = 4
"""How many streams decode side by side, after the prompts' own single ones."""

ANSWER_TOKENS = 4

PATIENCE_S = 120.0
"""After this the worker starts without figures: the first uses of an engine may compile something."""


async def measure(engine: Engine, costs: WorkerCosts) -> None:
    """Run some requests on an engine that nobody else uses yet, and start `costs` from what they took."""
    prompts: list[tuple[float, float]] = []
    steps: list[tuple[float, float]] = []
    longest = min(engine.facts.max_step_tokens or PROMPTS[-1], engine.facts.max_model_len - ANSWER_TOKENS)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await _run(engine, 1, min(PROMPTS[0], longest), [], [])  # what compiles or loads on first use
            for tokens in (min(PROMPTS[0], -(-longest // 3)), min(PROMPTS[1], longest)):
                await _run(engine, 1, tokens, prompts, steps)
            await _run(engine, STREAMS, 1, [], steps)
        await engine.call("reset_prefix_cache")
    except TimeoutError:
        logger.warning("the engine's self-measurement took over %g s: it starts without figures", PATIENCE_S)
        return
    if prompts and steps:
        costs.seed(prompts, steps)
        read, wrote = costs.prefill, costs.step
        if read is not None and wrote is not None:
            logger.info("reads a prompt in %.1f ms + %.3f ms a token, makes a step in %.1f ms + %.2f ms a stream",
                        read.fixed_s * 1e3, read.each_s * 1e3, wrote.fixed_s * 1e3, wrote.each_s * 1e3)  # fmt: skip


async def _run(
    engine: Engine, requests: int, tokens: int, prompts: list[tuple[float, float]], steps: list[tuple[float, float]]
) -> None:
    """Some equal requests at once; notes the seconds of steps that only read or only wrote."""
    running = [_request(tokens) for _ in range(requests)]
    left = {request.request_id for request in running}
    for request in running:
        await engine.add(request)
    try:
        await _follow(engine, left, tokens * requests, prompts, steps)
    finally:
        if left:
            await engine.abort(list(left))


async def _follow(
    engine: Engine, left: set[str], tokens: int, prompts: list[tuple[float, float]], steps: list[tuple[float, float]]
) -> None:
    """Note each step until the requests `left` have ended."""
    while left:
        outputs = await engine.outputs()
        left -= {output.request_id for output in outputs.outputs if output.finished}
        step = outputs.scheduler_stats.iteration_details if outputs.scheduler_stats else None
        if step is None:
            continue
        seconds = max(step.elapsed_ms / 1000.0, 2 * LEAST_S)
        if not step.num_ctx_tokens and step.num_generation_requests:
            steps.append((step.num_generation_requests, seconds))
        elif step.num_ctx_tokens == tokens and not step.num_generation_requests:
            prompts.append((step.num_ctx_tokens, seconds))


def _request(tokens: int) -> EngineCoreRequest:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=f"self-measurement-{uuid.uuid4().hex}",
        prompt_token_ids=random.choices(range(100, 1000), k=tokens),  # noqa: S311  # nothing secret
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
