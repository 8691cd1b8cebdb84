"""What a client meets first: API keys and the limit on the body."""

from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

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
