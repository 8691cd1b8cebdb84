"""The front end's view of who holds what: simulated engines publish, requests are looked up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from kv_transfer.settings import EngineSettings, SimulatorSettings
from kv_transfer.simulator import SimulatedEngine
from runtime import engine_board
from runtime.cache_view import CacheView

BLOCK = 4
PROMPT = list(range(100, 150))
HELD = len(PROMPT) // BLOCK * BLOCK


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[SimulatedEngine]:
    """A small simulated engine that publishes its events."""
    (tmp_path / "config.json").write_text('{"vocab_size": 2000, "max_position_embeddings": 256}')
    simulator = SimulatorSettings(zero_time=True, block_tokens=BLOCK, num_blocks=40)  # type: ignore[call-arg]
    engine = await SimulatedEngine.start(EngineSettings(role="prefill", model=str(tmp_path), simulator=simulator))  # type: ignore[call-arg]
    yield engine
    engine.shutdown()


def request(name: str, prompt: list[int] = PROMPT, salt: str | None = None, lora: str | None = None) -> Any:
    """A request as a front end makes it."""
    adapter = LoRARequest(lora, 1, "/lora") if lora else None
    return EngineCoreRequest(name, prompt, None, SamplingParams(max_tokens=1), None, 0.0, adapter, salt, None)


async def run(engine: SimulatedEngine, asked: EngineCoreRequest) -> None:
    """Run a request to its end."""
    await engine.add(asked)
    while not any(output.finished for output in (await engine.outputs()).outputs):
        pass


async def until(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return condition()


def held(view: CacheView, asked: EngineCoreRequest) -> dict[str, int]:
    """Tokens that each worker holds of a request's prompt."""
    return dict(view.match(view.keys_of(asked), time.monotonic()))


async def test_follows_a_worker_from_before_and_after_it_joined(engine: SimulatedEngine) -> None:
    """What was stored before is replayed, what comes later is published; what is evicted goes."""
    name, view = engine.facts.engine_id, CacheView(10_000)
    await run(engine, request("before"))
    view.join(engine.facts)
    assert await until(lambda: held(view, request("x")) == {name: HELD})
    other = list(range(200, 280))
    await run(engine, request("after", other))
    assert await until(lambda: held(view, request("x", other)) == {name: 80})
    await run(engine, request("evicts", list(range(300, 440))))
    assert await until(lambda: not held(view, request("x")) or held(view, request("x"))[name] < HELD)
    assert view.feeds[name].gaps == 0
    view.close()


async def test_adapter_and_salt_tell_prompts_apart(engine: SimulatedEngine) -> None:
    """The same tokens with another adapter or salt are other blocks."""
    name, view = engine.facts.engine_id, CacheView(10_000)
    view.join(engine.facts)
    asked = [request("plain"), request("salted", salt="s"), request("adapted", lora="l")]
    for mine in asked:
        assert not held(view, mine)
        await run(engine, mine)
        assert await until(lambda mine=mine: held(view, mine) == {name: HELD})  # type: ignore[misc]
    assert not held(view, request("both", salt="s", lora="l"))
    view.close()


async def test_a_worker_that_ray_serve_no_longer_announces_is_forgotten(engine: SimulatedEngine) -> None:
    """Its blocks are no reason to send a request anywhere."""
    application, view = f"test-{engine.facts.engine_id}", CacheView(10_000)
    view.follow(application, ["prefill"])
    engine_board.publish(application, "prefill", [engine.facts.to_dict()])
    await run(engine, request("r"))
    assert await until(lambda: held(view, request("x")) != {})
    engine_board.publish(application, "prefill", [])
    assert await until(lambda: held(view, request("x")) == {})
    assert await until(lambda: view.index is not None and len(view.index) == 0)


async def test_a_routed_prompt_is_expected_where_it_went(engine: SimulatedEngine) -> None:
    """Until the worker's own news, so that the next turn of a burst follows the first; unknown workers hold nothing."""
    view = CacheView(10_000)
    view.join(engine.facts)
    keys = view.keys_of(request("r"))
    view.predict([engine.facts.engine_id, "unknown"], keys, time.monotonic())
    assert held(view, request("r")) == {engine.facts.engine_id: HELD}
    view.close()
