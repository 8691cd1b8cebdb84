"""A worker takes work only from its own application, and nothing that a client sends selects a worker or a host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from kv_transfer.peer import WrongApplication, WrongIncarnation
from kv_transfer.worker import EngineWorker
from runtime.config_file import parse
from runtime.errors import ConfigError
from runtime.live_request import trusted
from tests.unit.simulated_worker import TOKEN, simulated_worker
from tests.unit.test_resume import engine_request


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[EngineWorker]:
    """A decode worker with a simulated engine."""
    async with simulated_worker("decode", tmp_path) as worker:
        yield worker


async def every_call(worker: EngineWorker, engine_id: str | None, token: str) -> AsyncIterator[Any]:
    """Each way in, as an awaitable."""
    yield worker.exchange(engine_id or "", token, "front-end", [], [], {})
    yield anext(worker.outputs(engine_id or "", token, "front-end"))
    yield worker.call(engine_id, token, "state", [])
    yield worker.describe(engine_id, token)


@pytest.mark.parametrize("token", ["", "another's", TOKEN.upper(), TOKEN + "x", "ü"])
@pytest.mark.parametrize("names_the_engine", [True, False])
async def test_another_applications_call_is_refused(worker: EngineWorker, token: str, names_the_engine: bool) -> None:
    """Every way in asks for the token, also where the caller takes whichever worker answers."""
    count = 0
    async for call in every_call(worker, worker.engine.facts.engine_id if names_the_engine else None, token):
        count += 1
        with pytest.raises(WrongApplication):
            await call
    assert count == 4


async def test_its_own_applications_call_is_taken(worker: EngineWorker) -> None:
    """With the token; and the engine has still to be the one that is meant."""
    assert "running" in await worker.call(None, TOKEN, "state", [])
    assert "running" in await worker.call(worker.engine.facts.engine_id, TOKEN, "state", [])
    with pytest.raises(WrongIncarnation):
        await worker.call("another", TOKEN, "state", [])


def test_what_makes_an_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old and new processes of an update understand each other; revisions, names and secrets keep apart."""
    plain = parse({"model": "m"})
    assert parse({"model": "m", "limits": {"drain_s": 1}, "env": {"A": "1"}}).token() == plain.token()
    others = [{"model": "n"}, {"model": "m", "revision": "2"}, {"model": "m", "name": "other"}]
    monkeypatch.setenv("BATON_SECRET", "s")
    others.append({"model": "m", "secret_env": "BATON_SECRET"})
    tokens = {parse(other).token() for other in others} | {plain.token()}
    assert len(tokens) == len(others) + 1
    assert parse({"model": "m"}).engine_settings("decode").token == plain.token()
    monkeypatch.setenv("BATON_SECRET", "")
    with pytest.raises(ConfigError, match="BATON_SECRET"):
        parse(others[-1]).token()


def test_a_client_can_not_choose_where_its_request_runs() -> None:
    """Whatever the API lets through to the engine's request, rank, hints and KV parameters are Baton's."""
    params = SamplingParams(extra_args={"kv_transfer_params": {"remote_host": "10.0.0.1"}, "x": 1})
    request = trusted(engine_request(params, data_parallel_rank=3, client_index=5, current_wave=9))
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == {"x": 1}
    assert (request.data_parallel_rank, request.kv_hints, request.client_index, request.current_wave) == (
        None, None, 0, 0,
    )  # fmt: skip
