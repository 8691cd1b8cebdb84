"""Several front ends over the same workers: each sees the others' work, and together they spread it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from runtime.policy.routing import route
from runtime.policy.types import Disaggregated, Local, RequestView, WorkerView
from tests.chaos.fabric import Fabric
from tests.chaos.front_end import FrontEnd
from tests.chaos.model import VOCABULARY, bare_model

NEWS_S = 0.5
"""Within this all news have come."""


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes a fabric of four workers a pool, and three front ends."""
    made: list[Any] = []

    async def build(preset: str = "latency", **simulator: Any) -> tuple[Fabric, list[FrontEnd]]:
        fabric = Fabric(bare_model(tmp_path), 1, 4, hang_s=30, **{"prefill_tokens_per_s": 20_000, **simulator})
        await fabric.start()
        front_ends = [FrontEnd(fabric, preset=preset) for _ in range(3)]
        made.extend((*front_ends, fabric))
        await asyncio.gather(*(front_end.start() for front_end in front_ends))
        while not all(len(f.cluster.fleet.links()) == 8 for f in front_ends):
            await asyncio.sleep(0.05)
        return fabric, front_ends

    yield build
    for thing in made:
        await thing.close()


async def read(front_end: FrontEnd, name: str, prompt: list[int], tokens: int) -> list[int]:
    """The whole answer of a greedy request."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    return [token async for part in front_end.stream(name, prompt, params) for token in part]


def figures(front_end: FrontEnd) -> dict[str, tuple[Any, ...]]:
    """What a front end knows of each worker's load; not what it sent itself."""
    snapshot = front_end.cluster.fleet.snapshot()

    def of(view: WorkerView) -> tuple[Any, ...]:
        return view.queued_tokens, view.queued_requests, view.streams, view.pulling_tokens, view.free_blocks

    return {view.engine_id: of(view) for view in (*snapshot.prefill, *snapshot.decode)}


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return condition()


def prompt_of(rng: random.Random, tokens: int) -> list[int]:
    """A prompt that no cache has."""
    return rng.choices(range(VOCABULARY), k=tokens)


async def test_three_front_ends_see_the_same(make: Callable[..., Any]) -> None:
    """Streams of all three run; each front end has the same figures of all workers, and they are the workers' own."""
    fabric, front_ends = await make(step_base_s=0.02)
    rng = random.Random(1)
    work = [
        asyncio.ensure_future(read(front_ends[number % 3], f"r{number}", prompt_of(rng, 300), 400))
        for number in range(24)
    ]
    workers = fabric.workers()
    assert await until(lambda: sum(worker.simulated.state()["running"] for worker in workers) == 24)
    assert await until(lambda: figures(front_ends[0]) == figures(front_ends[1]) == figures(front_ends[2]))
    for worker in workers:
        assert figures(front_ends[0])[worker.engine.facts.engine_id][2] == worker.simulated.state()["running"]
    for task in work:
        task.cancel()


async def test_one_front_end_avoids_what_another_has_filled(make: Callable[..., Any]) -> None:
    """Work that a front end did not send itself counts as much."""
    fabric, (one, other, _) = await make("always-disaggregated")
    busy = {role: fabric.pools[role][0].engine.facts.engine_id for role in ("prefill", "decode")}
    filled = fabric.pools["prefill"][0].simulated
    before = filled.prompt_tokens_computed
    rng = random.Random(2)
    work = []
    for number in range(8):
        one.cluster.pin(f"long-{number}", Disaggregated(busy["prefill"], busy["decode"]))
        work.append(asyncio.ensure_future(read(one, f"long-{number}", prompt_of(rng, 4000), 2)))
    await asyncio.sleep(NEWS_S)
    assert filled.prompt_tokens_computed - before < 7 * 4000, "the worker has to be busy still"
    await asyncio.gather(*(read(other, f"r{number}", prompt_of(rng, 200), 2) for number in range(12)))
    await asyncio.gather(*work)
    assert filled.prompt_tokens_computed - before == 8 * 4000


async def test_bursts_of_three_front_ends_spread(make: Callable[..., Any]) -> None:
    """Each sends 40 prompts at once, of very different lengths: no prefill worker gets much more than its share."""
    fabric, front_ends = await make("always-disaggregated")
    before = [worker.simulated.prompt_tokens_computed for worker in fabric.pools["prefill"]]
    rng = random.Random(3)
    requests = [
        read(front_ends[number % 3], f"r{number}", prompt_of(rng, rng.choice((50, 100, 200, 400, 1500))), 2)
        for number in range(120)
    ]
    await asyncio.gather(*requests)
    shares = [w.simulated.prompt_tokens_computed - b for w, b in zip(fabric.pools["prefill"], before, strict=True)]
    assert max(shares) < 1.25 * sum(shares) / 4, shares


async def test_short_prompts_are_read_where_they_are_decoded(make: Callable[..., Any]) -> None:
    """With measured costs the default preset disaggregates what would hold up streams, and nothing else."""
    fabric, (front_end, *_) = await make(prefill_tokens_per_s=5_000, step_base_s=0.02)
    fleet, rng = front_end.cluster.fleet, random.Random(4)
    decode = [worker.engine.facts.engine_id for worker in fabric.pools["decode"]]
    streams = [asyncio.ensure_future(read(front_end, f"s{i}", prompt_of(rng, 20), 500)) for i in range(8)]
    await asyncio.sleep(NEWS_S)
    assert all(view.streams and view.prefill and view.step for view in fleet.snapshot().decode)
    plans = {name: route(RequestView(tokens), fleet.snapshot()) for name, tokens in (("short", 40), ("long", 4000))}
    assert isinstance(plans["short"], Local) and plans["short"].decode in decode
    assert isinstance(plans["long"], Disaggregated)
    assert plans["long"].predicted is not None and plans["long"].predicted.measured
    assert plans["long"].predicted.ttft_s == pytest.approx(4000 / 5000, rel=0.3)
    for task in streams:
        task.cancel()
