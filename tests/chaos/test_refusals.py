"""Refusals through vLLM's whole app: every API, streamed or not, gets a status before the response starts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from runtime.config import Config, model_dir
from runtime.config_file import parse
from runtime.errors import ConfigError
from runtime.frontend import FrontEnd, start_front_end
from tests.chaos.fabric import ROLES, Fabric
from tests.chaos.handles import Handle

SLOW = {**Fabric.SIMULATOR, "prefill_tokens_per_s": 4000, "max_batch_requests": 4}
SETTINGS: dict[str, Any] = {
    "engine": "simulated",
    "engine_args": {"max_model_len": 8192},
    "admission": {"engine_queue_tokens": 2000, "engine_streams": 4},
}
NUMBERS = count(2000)


class House:
    """vLLM's app behind its edge, over one slow worker of each pool."""

    def __init__(self, config: Config, fabric: Fabric, front_end: FrontEnd) -> None:
        self.model, self.fabric, self.front_end = config.model_name, fabric, front_end
        transport = httpx.ASGITransport(front_end.asgi)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120)

    async def post(self, path: str = "/v1/completions", deadline_ms: int | None = None, **more: Any) -> httpx.Response:
        """A prompt that nobody has sent before: 3,000 tokens where tokens can be sent, else about 1,000."""
        number = next(NUMBERS)
        body: dict[str, Any] = {"model": self.model, "max_tokens": 1}
        if path == "/v1/completions":
            body["prompt"] = [number, *range(3000, 5999)]
        elif path == "/v1/responses":
            body = {"model": self.model, "max_output_tokens": 4, "input": f"{number} " * 250}
        else:
            body["messages"] = [{"role": "user", "content": f"{number} " * 250}]
        headers = {}
        if deadline_ms is not None:
            headers = {"x-baton-deadline-ms": str(deadline_ms), "x-baton-priority": "low"}
        return await self.http.post(path, json={**body, **more}, headers=headers)


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    """The app, with a queue of several seconds; all that waits is answered at the end."""
    try:
        model = model_dir("demo")
    except (ConfigError, OSError) as problem:
        pytest.skip(f"needs the demo model: {problem}")
    monkeypatch.setattr(Fabric, "SIMULATOR", SLOW)
    fabric = Fabric(Path(model), 0, 1, hang_s=60)
    config = parse({**SETTINGS, "name": fabric.application})
    await fabric.start()
    handles: Any = {role: Handle(fabric, role) for role in ROLES}
    front_end = await start_front_end(config, handles, token=fabric.token)
    house = House(config, fabric, front_end)
    queue = [asyncio.ensure_future(house.post()) for _ in range(12)]
    await asyncio.sleep(0.5)
    yield house
    assert {(await response).status_code for response in queue} == {200}
    assert front_end.llm.output_processor.get_num_unfinished_requests() == 0
    assert not front_end.llm.cluster._live
    await house.http.aclose()
    front_end.shutdown()
    await fabric.close()


def refused() -> float:
    """How many were refused as overloaded so far."""
    return REGISTRY.get_sample_value("baton_refusals_total", {"reason": "overloaded"}) or 0.0


async def test_every_api(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """429 in the API's own shape, with reason and Retry-After, counted once; vLLM logs no internal error."""
    complaints = logging.getLogger("vllm.entrypoints")
    complaints.addHandler(caplog.handler)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        for stream in (False, True):
            before = refused()
            response = await house.post(path, deadline_ms=900, stream=stream)
            assert response.status_code == 429, response.text
            assert response.headers["x-baton-refusal"] == "overloaded"
            assert response.headers["content-type"] == "application/json"
            assert 1 <= int(response.headers["retry-after"]) <= 20
            error = response.json()["error"]
            assert error.get("code", "overloaded") == "overloaded"
            assert response.json().get("type") == ("error" if path == "/v1/messages" else None)
            assert refused() == before + 1
    complaints.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_all_of_one_response_together(house: House) -> None:
    """Three choices of each of two prompts: one refusal, and nothing of it goes on."""
    before = refused()
    response = await house.post(deadline_ms=900, prompt=[[*range(5, 3000)], [*range(6, 3000)]], n=3)
    assert response.status_code == 429
    assert refused() == before + 1
    response = await house.post(prompt=[[5, 6, 7], [6, 7, 8]], n=3)
    assert response.status_code == 200
    assert len(response.json()["choices"]) == 6


async def test_over_the_window(house: House) -> None:
    """Refused by vLLM itself, whatever the queue: 400 with OpenAI's code; other bad input as vLLM has it."""
    response = await house.post(prompt=[5] * 9000)
    assert response.status_code == 400
    assert response.headers["x-baton-refusal"] == response.json()["error"]["code"] == "context_length_exceeded"
    response = await house.post(temperature=-1)
    assert (response.status_code, response.json()["error"]["code"]) == (400, 400)
