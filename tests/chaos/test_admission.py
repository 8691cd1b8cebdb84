"""The waiting room in front of real clusters, workers and simulated engines: short engine queues, our order, no work
for nobody, and no request lost when workers die meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from runtime import fleet as fleet_module
from runtime.policy.admission import AdmissionPolicy
from runtime.visit import Visit, current_visit
from tests.chaos.fabric import Fabric
from tests.chaos.front_end import FrontEnd, fabrics
from tests.chaos.model import answer, bare_model
from tests.chaos.test_in_process import nothing_left

OVERLOAD_S = float(os.environ.get("BATON_OVERLOAD_S", "8"))
"""How long the overload lasts; `BATON_OVERLOAD_S=60` with `-s` for the figures in docs/admission.md."""

NUMBERS = count()
"""No two requests of a load have a prompt that is in a cache."""

PLACES = 4
SLOW = {**Fabric.SIMULATOR, "step_base_s": 0.004, "max_batch_requests": PLACES, "prefill_tokens_per_s": 20_000}


@pytest.fixture
async def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """Makes a fabric of slow engines with few places, and a front end, and closes both."""
    monkeypatch.setattr(fleet_module, "RECONNECT_S", 0.05)
    monkeypatch.setattr(Fabric, "SIMULATOR", SLOW)
    async with fabrics() as start:

        async def build(workers: int = 1, seed: int = 0, **policy: Any) -> tuple[Fabric, FrontEnd]:
            admission = AdmissionPolicy(**{"engine_streams": PLACES, "engine_queue_tokens": 2000, **policy})
            return await start(Fabric(bare_model(tmp_path), seed, workers, hang_s=30.0), admission)

        yield build


async def ask(front_end: FrontEnd, name: str, prompt: list[int], tokens: int, visit: Visit | None = None) -> Any:
    """The answer, or the reason why there is none."""
    visit = visit or Visit()
    current_visit.set(visit)  # of this task only
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    try:
        return [token async for part in front_end.stream(name, prompt, params) for token in part]
    except RuntimeError:
        assert visit.refusal is not None
        return visit.refusal.reason


def prompt_of(number: int, tokens: int = 200) -> list[int]:
    return [number, *range(tokens - 1)]


def waiting(fabric: Fabric) -> int:
    """Requests in the queues of all engines."""
    return sum(worker.simulated.state()["waiting"] for worker in fabric.workers())


@pytest.mark.parametrize("workers", [1, 2])
async def test_engines_queues_stay_short(make: Callable[..., Any], workers: int) -> None:
    """Ten times as many requests as places: all are answered right, and hardly any waits in an engine."""
    fabric, front_end = await make(workers)
    count, longest = 10 * PLACES * workers, 0
    tasks = [asyncio.ensure_future(ask(front_end, str(i), prompt_of(i), 10)) for i in range(count)]
    while not all(task.done() for task in tasks):
        longest = max(longest, waiting(fabric))
        await asyncio.sleep(0.005)
    assert [task.result() for task in tasks] == [answer(prompt_of(i), 10) for i in range(count)]
    assert longest <= 2 * PLACES * workers
    await nothing_left(fabric, front_end)


async def test_the_order_is_ours(make: Callable[..., Any]) -> None:
    """With all places taken, later requests of a better class are answered before earlier ones."""
    _, front_end = await make()
    done: list[str] = []

    async def note(name: str, number: int, level: int) -> None:
        await ask(front_end, name, prompt_of(number), 20, Visit(level=level))
        done.append(name)

    first = [asyncio.ensure_future(note("first", i, 1)) for i in range(2 * PLACES)]
    await asyncio.sleep(0.02)
    later = [
        asyncio.ensure_future(note(name, 100 + i, level)) for i, (name, level) in enumerate(2 * PLACES * [("low", 2)])
    ]
    later += [asyncio.ensure_future(note("high", 200 + i, 0)) for i in range(2 * PLACES)]
    await asyncio.gather(*first, *later)
    assert max(i for i, name in enumerate(done) if name == "high") < min(
        i for i, name in enumerate(done) if name == "low"
    )


async def test_what_nobody_waits_for_is_not_computed(make: Callable[..., Any]) -> None:
    """Deadlines that pass, clients that leave and requests that are refused cost no engine a token."""
    fabric, front_end = await make(max_waiting_requests=10)
    long = [asyncio.ensure_future(ask(front_end, f"long {i}", prompt_of(i), 400)) for i in range(PLACES)]
    await asyncio.sleep(0.1)
    before = computed(fabric)
    late = [Visit(deadline=time.monotonic() + 0.2) for _ in range(3)]
    dropped = [asyncio.ensure_future(ask(front_end, "late", prompt_of(100 + i), 5, v)) for i, v in enumerate(late)]
    left = [asyncio.ensure_future(ask(front_end, "left", prompt_of(200 + i), 5)) for i in range(3)]
    more = [asyncio.ensure_future(ask(front_end, "more", prompt_of(300 + i), 5)) for i in range(20)]
    await asyncio.sleep(0.1)
    for task in left:
        task.cancel()
    refused = [task.result() for task in more if task.done()]
    assert refused == ["overloaded"] * 16
    assert await asyncio.gather(*dropped) == ["deadline"] * 3
    assert computed(fabric) == before
    for task in [*long, *more]:
        task.cancel()
    await nothing_left(fabric, front_end)


def computed(fabric: Fabric) -> int:
    """Prompt tokens that any engine has read."""
    states = [worker.simulated.state() for worker in fabric.workers()]
    return sum(state["prompt_tokens_computed"] for state in states)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_deaths_during_overload(make: Callable[..., Any], seed: int) -> None:
    """Workers die while many wait: who was let in is answered right, the others too, or are told why not."""
    fabric, front_end = await make(2, seed, max_waiting_requests=60)
    tasks = [asyncio.ensure_future(ask(front_end, str(i), prompt_of(i), 30)) for i in range(100)]
    for _ in range(6):
        await asyncio.sleep(0.15)
        fabric.kill(fabric.any(fabric.random.choice(("prefill", "decode"))))
    results = await asyncio.wait_for(asyncio.gather(*tasks), 60)
    answered = [i for i, result in enumerate(results) if result == answer(prompt_of(i), 30)]
    assert len(answered) >= 60
    assert {result for result in results if isinstance(result, str)} <= {"overloaded"}
    assert len(answered) + sum(isinstance(result, str) for result in results) == 100
    await nothing_left(fabric, front_end)


@dataclass
class Sent:
    """A request of an open load: when it was sent, its first token, and why there was none."""

    at: float
    first_s: float = float("inf")
    reason: str = ""


async def send(front_end: FrontEnd, number: int, sent: Sent) -> Sent:
    """Send one request and note what became of it."""
    visit = Visit()
    current_visit.set(visit)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    started = time.monotonic()
    try:
        async for _ in front_end.stream(str(number), prompt_of(number, 400), params):
            sent.first_s = min(sent.first_s, time.monotonic() - started)
    except RuntimeError:
        assert visit.refusal is not None
        sent.first_s, sent.reason = float("inf"), visit.refusal.reason
        assert visit.refusal.retry_after_s is not None
    return sent


async def load(front_end: FrontEnd, rate: float, seconds: float) -> list[asyncio.Task[Sent]]:
    """Requests at random times, whether earlier ones are answered or not."""
    chance, started, at, tasks = random.Random(5), time.monotonic(), 0.0, []
    while (at := at + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, started + at - time.monotonic()))
        tasks.append(asyncio.ensure_future(send(front_end, next(NUMBERS), Sent(at))))
    await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))
    return tasks


def resident_mb() -> float:
    """Resident memory of this process, which is everything here, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def test_overload(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times more than the workers can do: as much is answered in time as ever, the rest is told so with a reason,
    nothing is left over, memory is flat, and within five seconds all is as before."""
    monkeypatch.setattr(Fabric, "SIMULATOR", {**SLOW, "prefill_tokens_per_s": 2000, "max_batch_requests": 64})
    _, front_end = built = await make(engine_streams=64, engine_queue_tokens=800, max_wait_s=0.8)
    capacity, limit_s = 5.0, 2.0  # a prompt takes 0.2 s
    usual = await asyncio.gather(*await load(front_end, capacity, OVERLOAD_S))
    rushed = await load(front_end, 5 * capacity, OVERLOAD_S / 2)
    memory = [resident_mb()]
    rushed += await load(front_end, 5 * capacity, OVERLOAD_S / 2)
    memory.append(resident_mb())
    after = await asyncio.gather(*await load(front_end, 0.3 * capacity, 10.0))
    during = await asyncio.gather(*rushed)
    good = [sum(sent.first_s <= limit_s for sent in some) for some in (usual, during)]
    refused = Counter(sent.reason for sent in during if sent.reason)
    usual_s = sorted(sent.first_s for sent in usual if not sent.reason)
    normal_s = usual_s[int(0.95 * len(usual_s))]
    recovered_s = max((sent.at for sent in after if sent.first_s > limit_s), default=0.0)
    slowest_s = max(sent.first_s for sent in during if not sent.reason)
    print(f"in time: {good[0]} of {len(usual)} at capacity, {good[1]} of {len(during)} at five times; refused: "
          f"{dict(refused)}; slowest first token then {slowest_s:.2f} s; memory {memory[0]:.0f}, {memory[1]:.0f} MB; "
          f"usual p95 {normal_s:.2f} s; last one not in time sent {recovered_s:.1f} s after the end")  # fmt: skip
    assert good[1] >= 0.9 * good[0]
    assert set(refused) == {"overloaded"}
    assert refused.total() > len(during) / 2
    assert slowest_s <= 2 * limit_s
    assert memory[1] < 1.05 * memory[0]
    assert recovered_s < 5.0
    assert not front_end.cluster._live
    assert not front_end.cluster.legs.by_id
    await nothing_left(*built)
