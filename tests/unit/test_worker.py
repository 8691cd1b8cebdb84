"""A worker's front ends: what becomes of their legs and handoffs when one leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreRequest

from kv_transfer import peers
from kv_transfer.handoff import release_leg
from kv_transfer.peer import NoStream
from kv_transfer.worker import EngineWorker
from tests.unit.simulated_worker import TOKEN, simulated_worker
from tests.unit.test_ledger import handoff
from tests.unit.test_simulator import new_request


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[EngineWorker]:
    """A prefill worker with a simulated engine."""
    async with simulated_worker("prefill", tmp_path) as worker:
        yield worker


class SlowEngine:
    """Takes requests one after the other, each when it is told to, and notes what it was given."""

    def __init__(self, worker: EngineWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.given: list[str] = []
        monkeypatch.setattr(worker.engine, "add", self._add)
        monkeypatch.setattr(worker.engine, "abort", self._abort)

    async def _add(self, request: EngineCoreRequest) -> None:
        self.given.append(request.request_id)
        self.came.set()
        await self.goes_on.wait()

    async def _abort(self, leg_ids: list[str]) -> None:
        self.given += [f"abort {leg_id}" for leg_id in leg_ids]


async def test_a_front_end_leaves_while_the_engine_takes_its_legs(
    worker: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leg that is being taken is aborted, those after it never begin, and what was to be settled is released."""
    monkeypatch.setattr(peers, "FRONT_END_SILENCE_S", 0.02)
    engine_id = worker.engine.facts.engine_id
    stream = worker.outputs(engine_id, TOKEN, "front-end")
    await anext(stream)
    pinned = handoff("pinned", engine_id)
    peer = worker._peers.get("front-end")
    assert peer is not None
    peer.handoffs["pinned"] = pinned.params
    engine = SlowEngine(worker, monkeypatch)
    commands: list[Any] = [new_request("a"), new_request("b"), release_leg(pinned)]
    exchange = asyncio.create_task(worker.exchange(engine_id, TOKEN, "front-end", commands, ["pinned"], {}))
    await engine.came.wait()
    leaving = asyncio.create_task(stream.aclose())  # type: ignore[attr-defined]
    while worker._peers:
        await asyncio.sleep(0)
    engine.goes_on.set()
    with pytest.raises(NoStream):
        await exchange
    await leaving
    assert engine.given == ["a", "abort a"], "a decode engine that has not heard of it yet may be pulling"
    while len(engine.given) < 3:
        await asyncio.sleep(0.01)
    assert engine.given[2] == "pinned-release"
    assert worker._peers.owners == {}


async def test_a_task_that_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """In the log and as a count; one that is cancelled is none."""
    worker = EngineWorker()

    async def fail() -> None:
        raise ValueError("a fault")

    async def wait() -> None:
        await asyncio.Event().wait()

    worker._spawn(fail())
    worker._spawn(wait())
    while len(worker._tasks) > 1:
        await asyncio.sleep(0)
    waits = next(iter(worker._tasks))
    worker.shutdown()
    await asyncio.wait({waits})
    assert worker._counts == {"failed_tasks": 1}
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["a fault"]
