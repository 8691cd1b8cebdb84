"""The front end's own HTTP server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from runtime.errors import ConfigError
from runtime.http_server import HttpServer, listen
from tests.conftest import free_port


async def slow(request: Request) -> StreamingResponse:
    """Three lines, the last two when the test says so."""

    async def lines() -> AsyncIterator[str]:
        yield "one\n"
        await request.app.state.go_on.wait()
        yield "two\n"
        yield "three\n"

    return StreamingResponse(lines())


def app() -> Starlette:
    app = Starlette(routes=[Route("/", slow)])
    app.state.go_on = asyncio.Event()
    return app


async def test_an_open_stream_ends_before_the_server() -> None:
    """While it stops no new connection is taken, and what is open gets its time."""
    served, port = app(), free_port()
    server = HttpServer(served, "127.0.0.1", port)
    async with httpx.AsyncClient() as client, client.stream("GET", f"http://127.0.0.1:{port}/") as response:
        lines = response.aiter_lines()
        assert await anext(lines) == "one"
        stopping = asyncio.ensure_future(server.stop(grace_s=30))
        with pytest.raises(httpx.ConnectError):  # as soon as the server has noticed
            while True:
                async with httpx.AsyncClient() as another:
                    await another.get(f"http://127.0.0.1:{port}/nothing")
        assert not stopping.done()
        served.state.go_on.set()
        assert [line async for line in lines] == ["two", "three"]
    await stopping


async def test_a_stream_that_takes_too_long_is_cut() -> None:
    """After the grace period."""
    port = free_port()
    server = HttpServer(app(), "127.0.0.1", port)
    async with httpx.AsyncClient() as client, client.stream("GET", f"http://127.0.0.1:{port}/") as response:
        lines = response.aiter_lines()
        assert await anext(lines) == "one"
        await server.stop(grace_s=1)
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(lines)


async def test_several_front_ends_share_an_address() -> None:
    """Each gets some of the connections; one goes, and the others go on."""
    port = free_port()
    apps = [app(), app()]
    servers = [HttpServer(each, "127.0.0.1", port, shared=True) for each in apps]
    for each in apps:
        each.state.go_on.set()
    await servers[0].stop(grace_s=1)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/")).text == "one\ntwo\nthree\n"
    await servers[1].stop(grace_s=1)


def test_a_taken_port_is_told() -> None:
    """With the key to change, and before anything has started."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}: Address already in use.*front_end.port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_told() -> None:
    """A host that this machine does not have."""
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77:80.*front_end\.host"):
        listen("192.0.2.77", 80)
