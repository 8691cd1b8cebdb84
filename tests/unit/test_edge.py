"""What a client meets first: API keys and the limit on the body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from runtime import frontend
from runtime.frontend import Edge


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


PATHS = ("/v1/models", "/health", "/metrics", "/tokenize", "/v1/completions")
APP = Starlette(routes=[Route(path, echo, methods=["GET", "POST"]) for path in PATHS])


def client(*keys: str) -> httpx.AsyncClient:
    """A client of the app behind an edge."""
    transport = httpx.ASGITransport(Edge(APP, max_body_bytes=1000, api_keys=keys))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {}, 401),
        ("/tokenize", {}, 401),
        ("/v1/models", {"Authorization": "Bearer wrong"}, 401),
        ("/v1/models", {"Authorization": "Basic one"}, 401),
        ("/v1/models", {"Authorization": "Bearer one"}, 200),
        ("/v1/models", {"Authorization": "bearer two"}, 200),
        ("/v1/models", {"x-api-key": "two"}, 200),
        ("/health", {}, 200),
        ("/metrics", {}, 200),
    ],
)
async def test_api_keys(path: str, headers: dict[str, str], status: int) -> None:
    """Every path but probes and metrics needs one of the keys."""
    async with client("one", "two") as http:
        response = await http.get(path, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "unauthorized"


async def test_no_keys_no_questions() -> None:
    """Without configured keys everything is open (on loopback, by default)."""
    async with client() as http:
        assert (await http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(("size", "status"), [(0, 200), (1000, 200), (1001, 413)])
@pytest.mark.parametrize("declared", [True, False])
async def test_body_limit(size: int, status: int, declared: bool) -> None:
    """Too large a body is refused by its declared length, or as soon as too much of it has come."""

    async def chunks() -> object:
        yield b"x" * size

    async with client() as http:
        response = await http.post("/v1/completions", content=b"x" * size if declared else chunks())  # type: ignore[arg-type]
    assert response.status_code == status
    if status == 413:
        assert "1000 bytes" in response.json()["error"]["message"]


async def test_a_waiting_stream_shows_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments while an event stream is silent, none in other answers, and none after the end."""
    monkeypatch.setattr(frontend, "KEEP_ALIVE_S", 0.02)

    async def slow() -> AsyncIterator[str]:
        yield "data: a\n\n"
        await asyncio.sleep(0.2)
        yield "data: b\n\n"

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(slow(), media_type=request.query_params["type"])

    app = Edge(Starlette(routes=[Route("/", stream)]), max_body_bytes=10, api_keys=())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        events = (await http.get("/", params={"type": "text/event-stream"})).text
        plain = (await http.get("/", params={"type": "text/plain"})).text
    assert plain == "data: a\n\ndata: b\n\n"
    assert events.replace(": waiting\n\n", "") == plain
    assert ": waiting\n\n" in events
