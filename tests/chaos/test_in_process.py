"""Hundreds of deaths, lost messages and failing pulls; every request ends once, with the undisturbed text."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from kv_transfer import worker as worker_module
from runtime import fleet as fleet_module
from runtime import link as link_module
from tests.chaos.fabric import Fabric, FrontEnd, answer, bare_model

SEEDS = [int(os.environ["BATON_CHAOS_SEED"])] if "BATON_CHAOS_SEED" in os.environ else [1, 2, 3]
"""`BATON_CHAOS_SEED=N` replays one run."""


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence and lost links are noticed sooner than in earnest."""
    monkeypatch.setattr(worker_module, "FRONT_END_SILENCE_S", 1.0)
    monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(fleet_module, "RECONNECT_S", 0.05)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes a fabric and a front end, and closes both."""
    made: list[Any] = []

    async def build(seed: int = 0, workers: int = 2, **limits: Any) -> tuple[Fabric, FrontEnd]:
        fabric = Fabric(bare_model(tmp_path), seed, workers)
        await fabric.start()
        fabric.spawn_health()
        front_end = FrontEnd(fabric, **limits)
        made.extend((front_end, fabric))
        await front_end.start()
        return fabric, front_end

    yield build
    for thing in made:
        await thing.close()


async def read(front_end: FrontEnd, name: str, prompt: list[int], tokens: int, **params: Any) -> list[int]:
    """The whole answer of a greedy request."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, **params)
    return [token async for part in front_end.stream(name, prompt, sampling) for token in part]


async def nothing_left(fabric: Fabric, *front_ends: FrontEnd, within_s: float = 5.0) -> None:
    """No block is held, no handoff outstanding, and no lease had to run out."""
    deadline = time.monotonic() + within_s
    while fabric.blocks_held() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    held = {w.engine.facts.role: w.simulated.state() for pool in fabric.pools.values() for w in pool}
    assert fabric.blocks_held() == 0, held
    assert [front_end.cluster.ledger.outstanding() for front_end in front_ends] == [{} for _ in front_ends]
    assert fabric.leases_expired() == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_stream_outlives_every_worker_of_a_pool(make: Callable[..., Any], role: str) -> None:
    """Both workers of a pool die in the middle of a stream: not a token is lost or repeated."""
    fabric, front_end = await make()
    prompt, got = list(range(300)), []
    async for tokens in front_end.stream("r", prompt, SamplingParams(max_tokens=200, temperature=0.0)):
        got += tokens
        if len(got) in (50, 100):
            for worker in list(fabric.pools[role]):
                fabric.kill(worker, replace_after_s=0.5)
    assert got == answer(prompt, 200)
    await nothing_left(fabric, front_end)


async def test_a_stream_waits_for_a_replacement_when_nobody_is_left(make: Callable[..., Any]) -> None:
    """All workers of both pools die: the stream goes on when there is one again."""
    fabric, front_end = await make(workers=1)
    prompt, got = list(range(100)), []
    async for tokens in front_end.stream("r", prompt, SamplingParams(max_tokens=100, temperature=0.0)):
        got += tokens
        if len(got) == 30:
            for pool in fabric.pools.values():
                fabric.kill(pool[0], replace_after_s=0.3)
    assert got == answer(prompt, 100)
    await nothing_left(fabric, front_end)


async def test_nobody_comes_back(make: Callable[..., Any]) -> None:
    """The wait for a replacement is bounded; then the request ends with an error, once."""
    fabric, front_end = await make(workers=1, wait_for_worker_s=0.3)
    for pool in fabric.pools.values():
        fabric.kill(pool[0], replace_after_s=60)
    with pytest.raises(RuntimeError, match="ended with an error"):
        await asyncio.wait_for(read(front_end, "r", [1, 2, 3], 5), 10)


async def test_structured_output_is_not_continued(make: Callable[..., Any]) -> None:
    """A grammar can't be taken up in the middle: the stream ends with an error, not with text outside of it."""
    from vllm.sampling_params import StructuredOutputsParams

    fabric, front_end = await make()
    params = SamplingParams(max_tokens=500, temperature=0.0, structured_outputs=StructuredOutputsParams(regex="a+"))
    got: list[int] = []
    with pytest.raises(RuntimeError, match="ended with an error"):
        async for tokens in front_end.stream("r", [1, 2, 3], params):
            got += tokens
            if len(got) == 5:
                for worker in list(fabric.pools["decode"]):
                    fabric.kill(worker)
    await nothing_left(fabric, front_end)


async def test_a_hanging_engine_is_taken_for_dead(make: Callable[..., Any]) -> None:
    """Decode engines that stop making steps are noticed, and their streams go on elsewhere."""
    fabric, front_end = await make()
    prompt, got = list(range(50)), []
    async for tokens in front_end.stream("r", prompt, SamplingParams(max_tokens=100, temperature=0.0)):
        got += tokens
        if len(got) == 20:
            for worker in fabric.pools["decode"]:
                worker.simulated.faults.hang = True
    assert got == answer(prompt, 100)
    assert fabric.kills >= 1
    await nothing_left(fabric, front_end)


async def test_a_worker_whose_pulls_fail_is_set_aside(make: Callable[..., Any]) -> None:
    """Requests get their answers from the other one, and the sick one is taken back once it works."""
    fabric, front_end = await make(retry_budget=10)
    sick = fabric.pools["decode"][0]
    sick.simulated.faults.fail_pulls = 6
    prompts = [list(range(i, i + 40)) for i in range(40)]
    answers = await asyncio.gather(*(read(front_end, f"r{i}", prompt, 5) for i, prompt in enumerate(prompts)))
    assert answers == [answer(prompt, 5) for prompt in prompts]
    while sick.engine.facts.engine_id not in {w.engine_id for w in front_end.cluster.fleet.snapshot().decode}:
        await asyncio.sleep(0.05)
    assert sick.simulated.faults.fail_pulls == 0
    await nothing_left(fabric, front_end)


async def test_what_a_broken_link_swallowed_is_released(make: Callable[..., Any]) -> None:
    """A client leaves while its decode leg is on the way, and the leg never arrives: the blocks are free soon."""
    fabric, front_end = await make()
    fabric.swallows = "decode"
    leaver = asyncio.ensure_future(read(front_end, "r", list(range(500)), 5))
    while not front_end.cluster.ledger.outstanding():
        await asyncio.sleep(0.01)
    leaver.cancel()
    await asyncio.wait({leaver})
    assert fabric.blocks_held() > 0
    for link in front_end.cluster.fleet.links("decode"):
        link.close("it broke")
    fabric.swallows = None
    await nothing_left(fabric, front_end)


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01, 0.05, 0.2])
async def test_a_front_end_dies(make: Callable[..., Any], after_s: float) -> None:
    """Its requests' blocks are free within seconds on all workers, and another front end notices nothing."""
    fabric, survivor = await make()
    other = FrontEnd(fabric)
    await other.start()
    doomed = [asyncio.ensure_future(read(other, f"d{i}", list(range(i, i + 500)), 400)) for i in range(30)]
    lasting = [asyncio.ensure_future(read(survivor, f"s{i}", list(range(i, i + 500)), 50)) for i in range(30)]
    await asyncio.sleep(after_s)
    other.die()
    for task in doomed:
        task.cancel()
    assert await asyncio.gather(*lasting) == [answer(list(range(i, i + 500)), 50) for i in range(30)]
    await nothing_left(fabric, survivor, within_s=5.0)


async def test_a_drain_loses_nothing(make: Callable[..., Any]) -> None:
    """A worker that Ray Serve takes away finishes what it has and gets nothing new."""
    fabric, front_end = await make()
    work = [asyncio.ensure_future(read(front_end, f"r{i}", list(range(i, i + 300)), 60)) for i in range(20)]
    await asyncio.sleep(0.05)
    for role in ("prefill", "decode"):
        fabric.drain(fabric.pools[role][0])
    await asyncio.sleep(0.05)
    later = [asyncio.ensure_future(read(front_end, f"l{i}", list(range(i, i + 300)), 60)) for i in range(20)]
    expected = [answer(list(range(i, i + 300)), 60) for i in range(20)]
    assert await asyncio.gather(*work) == await asyncio.gather(*later) == expected
    snapshot = front_end.cluster.fleet.snapshot()
    assert (len(snapshot.prefill), len(snapshot.decode)) == (1, 1)
    assert len(front_end.cluster.fleet.workers) == 2, "a drained worker is let go"
    await nothing_left(fabric, front_end)


@pytest.mark.parametrize("seed", SEEDS)
async def test_everything_at_once(make: Callable[..., Any], seed: int) -> None:
    """Kills, hangs, failing pulls, lost and late messages, impatient clients, under load for some seconds."""
    fabric, front_end = await make(seed=seed, workers=3, retry_budget=100, wait_for_worker_s=30)
    second = FrontEnd(fabric, retry_budget=100, wait_for_worker_s=30)
    await second.start()
    chance = random.Random(seed)
    fabric.loss_rate, fabric.longest_delay_s = 0.0005, 0.01
    calm = asyncio.Event()

    async def trouble() -> None:
        while not calm.is_set():
            await asyncio.sleep(chance.uniform(0, 0.1))
            worker = fabric.any(chance.choice(("prefill", "decode")) if all(fabric.pools.values()) else _left(fabric))
            what = chance.random()
            if what < 0.7:
                fabric.kill(worker, replace_after_s=chance.uniform(0, 0.2))
            elif what < 0.8:
                worker.simulated.faults.hang = True
            else:
                worker.simulated.faults.fail_pulls += 1

    async def client(number: int) -> None:
        prompt = [chance.randrange(VOCABULARY_USED) for _ in range(chance.randint(1, 400))]
        tokens = chance.randint(1, 120)
        front = chance.choice((front_end, second))
        leaves_after = chance.randint(0, tokens) if chance.random() < 0.2 else None
        got: list[int] = []
        async for part in front.stream(f"r{number}", prompt, SamplingParams(max_tokens=tokens, temperature=0.0)):
            got += part
            if leaves_after is not None and len(got) > leaves_after:
                break
        expected = answer(prompt, tokens)
        assert got == expected[: len(got)]
        assert leaves_after is not None or len(got) == tokens

    async def clients(number: int) -> None:
        for turn in range(REQUESTS // CLIENTS):
            await client(number * 1000 + turn)

    mischief = asyncio.ensure_future(trouble())
    await asyncio.gather(*(clients(number) for number in range(CLIENTS)))
    calm.set()
    await mischief
    fabric.loss_rate = 0.0
    for worker in [worker for pool in fabric.pools.values() for worker in pool]:
        worker.simulated.faults.hang = False
        worker.simulated._work.set()
    print(f"seed {seed}: {fabric.kills} kills")
    assert fabric.kills >= 70
    await nothing_left(fabric, front_end, second)


VOCABULARY_USED = 15_000
REQUESTS, CLIENTS = 900, 45


def _left(fabric: Fabric) -> str:
    return next((role for role, pool in fabric.pools.items() if pool), "prefill")
