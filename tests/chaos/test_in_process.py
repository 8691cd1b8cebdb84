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
from vllm.v1.engine import EngineCoreOutput

from kv_transfer import peers
from kv_transfer import worker as worker_module
from runtime import fleet as fleet_module
from runtime import link as link_module
from runtime.legs import Leg
from runtime.limit_settings import LimitSettings
from tests.chaos.fabric import Fabric, Worker
from tests.chaos.front_end import FrontEnd, fabrics
from tests.chaos.model import answer, bare_model

SEEDS = [int(os.environ["BATON_CHAOS_SEED"])] if "BATON_CHAOS_SEED" in os.environ else [1, 2, 3]
"""`BATON_CHAOS_SEED=N` replays one run."""


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence and lost links are noticed sooner than in earnest, and output streams follow each other sooner."""
    monkeypatch.setattr(worker_module, "STREAM_MESSAGES", 20)
    monkeypatch.setattr(peers, "FRONT_END_SILENCE_S", 1.0)
    monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(fleet_module, "RECONNECT_S", 0.05)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes a fabric and a front end, and closes both."""
    async with fabrics() as start:

        async def build(seed: int = 0, workers: int = 2, **limits: Any) -> tuple[Fabric, FrontEnd]:
            settings = LimitSettings(**{"engine_hang_s": 10.0, **limits})
            fabric = Fabric(
                bare_model(tmp_path), seed, workers, settings.engine_hang_s, pull_timeout_s=settings.pull_timeout_s
            )
            return await start(fabric, **limits)

        yield build


async def read(front_end: FrontEnd, name: str, prompt: list[int], tokens: int, **params: Any) -> list[int]:
    """The whole answer of a greedy request."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, **params)
    return [token async for part in front_end.stream(name, prompt, sampling) for token in part]


def _left_over(fabric: Fabric, front_ends: tuple[FrontEnd, ...]) -> list[Any]:
    engines = [(w.engine.facts.role, w.simulated.state()) for w in fabric.workers()]
    outstanding = [front_end.cluster.ledger.outstanding() for front_end in front_ends]
    return [engine for engine in engines if engine[1]["blocks_held"]] + [count for count in outstanding if count]


async def nothing_left(fabric: Fabric, *front_ends: FrontEnd, within_s: float = 5.0) -> None:
    """Soon no block is held and no handoff outstanding, and no lease had to run out."""
    deadline = time.monotonic() + within_s
    while (left := _left_over(fabric, front_ends)) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert not left
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


async def test_what_may_not_be_continued_ends(make: Callable[..., Any]) -> None:
    """Where only exact continuations are allowed, a seeded stream ends with an error, once, and leaves nothing."""
    fabric, front_end = await make(resume="exact")
    params = SamplingParams(max_tokens=500, temperature=1.0, seed=1)
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
    fabric, front_end = await make(engine_hang_s=1.0)
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
    fabric, front_end = await make(workers=1)
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


async def test_a_client_leaves_as_its_prefill_ends(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill's end and the client's are one moment: the blocks are free soon, though nobody ever pulled them."""
    fabric, front_end = await make(workers=1)
    legs, left = front_end.cluster.legs, list[str]()
    prefilled = legs._prefilled

    def and_leave(leg: Leg, output: EngineCoreOutput) -> None:
        prefilled(leg, output)
        assert leg.live.task is not None
        leg.live.task.cancel()
        left.append(leg.id)

    monkeypatch.setattr(legs, "_prefilled", and_leave)
    leaver = asyncio.ensure_future(read(front_end, "r", list(range(500)), 5))
    async with asyncio.timeout(10):
        while not left:
            await asyncio.sleep(0.001)
    assert fabric.blocks_held() > 0
    leaver.cancel()
    await asyncio.wait({leaver})
    await nothing_left(fabric, front_end)


async def hung_pull(make: Callable[..., Any]) -> tuple[Fabric, FrontEnd, Worker, asyncio.Task[list[int]]]:
    """One worker of each role, of which the decode worker hangs as it pulls for a request, and that request."""
    fabric, front_end = await make(workers=1)
    decode = fabric.pools["decode"][0]
    decode.simulated.faults.hang_pulls = 1
    request = asyncio.create_task(read(front_end, "r", list(range(500)), 20))
    async with asyncio.timeout(10):
        while not decode.simulated.state()["fetching"]:
            await asyncio.sleep(0.01)
    return fabric, front_end, decode, request


async def test_the_last_decode_worker_dies_while_it_pulls(make: Callable[..., Any]) -> None:
    """The request goes on whole on the prefill worker, whose blocks are free although nobody is left to pull."""
    fabric, front_end, decode, running = await hung_pull(make)
    fabric.kill(decode, replace_after_s=60)
    assert await running == answer(list(range(500)), 20)
    await nothing_left(fabric, front_end)


async def test_a_link_breaks_during_a_pull(make: Callable[..., Any]) -> None:
    """The prefill worker lives on and frees its blocks in a while: the pull is given up before, and nothing is lost."""
    fabric, front_end, decode, running = await hung_pull(make)
    prefill = fabric.pools["prefill"][0]
    link = front_end.cluster.fleet.link(prefill.engine.facts.engine_id)
    (pulls,) = decode._peers.owners
    link.close("for the test")
    while pulls in decode._peers.owners:
        assert prefill.simulated.state()["handoffs"], "its blocks are there as long as anybody may read them"
        await asyncio.sleep(0.001)
    assert await running == answer(list(range(500)), 20)
    await nothing_left(fabric, front_end)


async def test_a_decode_worker_dies_before_it_can_abort(make: Callable[..., Any]) -> None:
    """A client leaves during a pull, and the decode worker that was told so dies: the blocks are free soon."""
    fabric, front_end, decode, leaver = await hung_pull(make)
    fabric.swallows = "decode"
    leaver.cancel()
    await asyncio.wait({leaver})
    while front_end.cluster.ledger.outstanding():
        await asyncio.sleep(0.01)
    assert fabric.blocks_held() > 0
    fabric.kill(decode)
    fabric.swallows = None
    await nothing_left(fabric, front_end)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_whose_legs_fail_is_set_aside(make: Callable[..., Any], role: str) -> None:
    """Also without a handoff: an engine that ends legs with errors gets none, until a probe works."""
    fabric, front_end = await make(retry_budget=10)
    sick = fabric.pools[role][0]
    sick.simulated.faults.fail_legs = 5
    prompts = [list(range(i, i + 40)) for i in range(40)]
    answers = await asyncio.gather(*(read(front_end, f"r{i}", prompt, 5) for i, prompt in enumerate(prompts)))
    assert answers == [answer(prompt, 5) for prompt in prompts]
    while sick.engine.facts.engine_id not in _ready(front_end, role):
        await asyncio.sleep(0.05)
    assert sick.simulated.faults.fail_legs == 0
    await nothing_left(fabric, front_end)


async def test_one_request_that_fails_everywhere_sets_nobody_aside(make: Callable[..., Any]) -> None:
    """It ends with an error when its retry budget is spent; the workers are not to blame."""
    fabric, front_end = await make(retry_budget=8)
    too_long = list(range(100))
    for worker in fabric.pools["decode"]:
        worker.simulated.faults.fail_pulls = worker.simulated.faults.fail_legs = 100
    changed = front_end.cluster.fleet.changed
    with pytest.raises(RuntimeError, match="ended with an error"):
        await read(front_end, "r", too_long, 5)
    assert not changed.is_set(), "a worker's state changed"
    for worker in fabric.pools["decode"]:
        worker.simulated.faults.fail_pulls = worker.simulated.faults.fail_legs = 0
    assert await read(front_end, "s", too_long, 5) == answer(too_long, 5)
    await nothing_left(fabric, front_end)


async def test_a_pull_that_hangs_is_given_up(make: Callable[..., Any]) -> None:
    """The request goes on, whole on one worker if need be; other pulls of the same engine are not touched."""
    fabric, front_end = await make(workers=1, pull_timeout_s=0.3, engine_hang_s=30.0)
    decode = fabric.pools["decode"][0]
    decode.simulated.faults.hang_pulls = 2
    prompts = [list(range(i, i + 200)) for i in range(5)]
    answers = await asyncio.gather(*(read(front_end, f"r{i}", prompt, 300) for i, prompt in enumerate(prompts)))
    assert answers == [answer(prompt, 300) for prompt in prompts]
    assert decode.simulated.faults.hang_pulls == 0
    assert fabric.kills == 0
    await nothing_left(fabric, front_end)


async def test_a_leg_that_waits_for_its_turn_does_not_hang(make: Callable[..., Any]) -> None:
    """A full decode engine makes legs wait longer than a pull may take: nothing is given up."""
    fabric, front_end = await make(workers=1, pull_timeout_s=0.3, retry_budget=0)
    decode = fabric.pools["decode"][0]
    decode.simulated._cache.capacity = 60
    prompts = [list(range(i, i + 200)) for i in range(8)]
    started = time.monotonic()
    answers = await asyncio.gather(*(read(front_end, f"r{i}", prompt, 300) for i, prompt in enumerate(prompts)))
    assert time.monotonic() - started > 0.6, "they had to wait"
    assert answers == [answer(prompt, 300) for prompt in prompts]
    await nothing_left(fabric, front_end)


def _ready(front_end: FrontEnd, role: str) -> set[str]:
    return {worker.engine_id for worker in getattr(front_end.cluster.fleet.snapshot(), role)}


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


async def test_a_stream_outlasts_its_workers_drain(make: Callable[..., Any]) -> None:
    """What a draining worker has not finished in time goes on elsewhere: nothing is lost, and it costs no retry."""
    fabric, front_end = await make(drain_s=0.1, retry_budget=0)
    prompt, got = list(range(200)), []
    async for tokens in front_end.stream("r", prompt, SamplingParams(max_tokens=400, temperature=0.0)):
        got += tokens
        if len(got) == 10:
            fleet = front_end.cluster.fleet
            leaving = next(engine_id for engine_id, worker in fleet.workers.items() if worker.account.requests)
            fabric.drain(next(w for w in fabric.pools["decode"] if w.engine.facts.engine_id == leaving))
            await asyncio.sleep(0.2)
            assert leaving not in fleet.workers
    assert got == answer(prompt, 400)
    await nothing_left(fabric, front_end)


async def test_a_draining_prefill_worker_waits_until_its_blocks_are_pulled(make: Callable[..., Any]) -> None:
    """It is let go only when the decode engine has the blocks, though it has no leg any more."""
    fabric, front_end = await make(workers=1)
    prefill, decode = fabric.pools["prefill"][0], fabric.pools["decode"][0]
    decode.simulated.faults.slow = 100  # so that this pull takes half a second
    work = asyncio.ensure_future(read(front_end, "r", list(range(2000)), 2))
    while not prefill.simulated.state()["handoffs"]:
        await asyncio.sleep(0.001)
    fabric.drain(prefill)
    await asyncio.sleep(0.1)
    assert prefill.engine.facts.engine_id in front_end.cluster.fleet.workers
    assert prefill.simulated.state()["handoffs"] == 1
    assert await work == answer(list(range(2000)), 2)
    assert decode.simulated.state()["pulls"] >= 2, "the blocks were pulled, as those of the warm-up were"
    while prefill.engine.facts.engine_id in front_end.cluster.fleet.workers:
        await asyncio.sleep(0.01)


async def test_a_client_leaves_while_everything_drains(make: Callable[..., Any]) -> None:
    """With no decode worker but a draining one, a handoff that nobody needs is still released, so both can go."""
    fabric, front_end = await make(workers=1)
    fabric.pools["decode"][0].simulated.faults.slow = 1e9
    streams = [asyncio.ensure_future(read(front_end, f"r{i}", list(range(i, 900 + i)), 5)) for i in range(3)]
    while fabric.pools["prefill"][0].simulated.state()["handoffs"] < 3:
        await asyncio.sleep(0.001)
    for role in ("prefill", "decode"):
        fabric.drain(fabric.pools[role][0])
    for stream in streams:
        stream.cancel()
    deadline = time.monotonic() + 3
    while front_end.cluster.fleet.workers and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not front_end.cluster.fleet.workers
    await nothing_left(fabric, front_end)


async def test_a_worker_that_is_announced_again_is_taken_back(make: Callable[..., Any]) -> None:
    """Ray Serve's controller starts anew and knows its replicas only after a while: nobody has to go for that."""
    fabric, front_end = await make(workers=1, drain_s=0.3)
    prompt, got = list(range(100)), []
    async for tokens in front_end.stream("r", prompt, SamplingParams(max_tokens=400, temperature=0.0)):
        got += tokens
        if len(got) == 10:
            fabric.drain(fabric.pools["decode"][0])
            await asyncio.sleep(0.05)
            fabric.announce("decode")
    assert got == answer(prompt, 400)
    await asyncio.sleep(0.4)
    assert len(front_end.cluster.fleet.snapshot().decode) == 1
    assert await read(front_end, "next", prompt, 5) == answer(prompt, 5)
    await nothing_left(fabric, front_end)


@pytest.mark.parametrize("seed", SEEDS)
async def test_everything_at_once(make: Callable[..., Any], seed: int) -> None:
    """Kills, hangs, failing pulls, lost and late messages, impatient clients, under load for some seconds."""
    fabric, front_end = await make(seed=seed, workers=3, engine_hang_s=1.0, retry_budget=100, wait_for_worker_s=30)
    second = FrontEnd(fabric, retry_budget=100, wait_for_worker_s=30)
    await second.start()
    chance = random.Random(seed)
    fabric.loss_rate, fabric.longest_delay_s = 0.0005, 0.01
    calm = asyncio.Event()

    async def trouble() -> None:
        while not calm.is_set():
            await asyncio.sleep(chance.uniform(0, 0.1))
            alive = [role for role, pool in fabric.pools.items() if pool]
            if not alive or not front_end.cluster.fleet.ready():
                continue  # or on a slow machine workers would die faster than they get warm, and nothing would go on
            worker = fabric.any(chance.choice(alive))
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
        turn = 0
        while turn < REQUESTS // CLIENTS or fabric.kills < KILLS:
            await client(number * 1000 + turn)
            turn += 1

    mischief = asyncio.ensure_future(trouble())
    await asyncio.gather(*(clients(number) for number in range(CLIENTS)))
    calm.set()
    await mischief
    fabric.loss_rate = 0.0
    for worker in fabric.workers():
        worker.simulated.faults.hang = False
        worker.simulated._work.set()
    print(f"seed {seed}: {fabric.kills} kills")
    assert fabric.kills >= KILLS
    await nothing_left(fabric, front_end, second, within_s=20)  # replacements may still be warming up


VOCABULARY_USED = 15_000
REQUESTS, CLIENTS, KILLS = 900, 45, 70
