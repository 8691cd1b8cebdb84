"""An engine that has work and makes no step is dead, and none is that has only just begun."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kv_transfer import worker as worker_module
from kv_transfer.engine import Engine, EngineDied
from kv_transfer.settings import EngineSettings
from tests.unit.simulated_worker import TOKEN, simulated_worker
from tests.unit.test_simulator import new_request

HANG_S = 1.0


async def test_the_time_of_a_hang_begins_with_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its start may take longer than that: its first legs have as long for their first step as all others."""
    start_engine = worker_module.start_engine

    async def start_slowly(settings: EngineSettings) -> Engine:
        await asyncio.sleep(1.1 * HANG_S)
        return await start_engine(settings)

    monkeypatch.setattr(worker_module, "start_engine", start_slowly)
    async with simulated_worker("decode", tmp_path, hang_s=HANG_S) as worker:
        engine_id = worker.engine.facts.engine_id
        await worker.call(engine_id, TOKEN, "inject_fault", ["hang", True])
        stream = worker.outputs(engine_id, TOKEN, "front-end")
        await anext(stream)
        await worker.exchange(engine_id, TOKEN, "front-end", [new_request("a")], [], {})
        await asyncio.sleep(0.4 * HANG_S)
        worker.check_health()
        async with asyncio.timeout(20 * HANG_S):
            while [message async for message in stream]:
                pass
        with pytest.raises(EngineDied, match="no step"):
            worker.check_health()
