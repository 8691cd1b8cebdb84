"""What benchmarks count."""

from __future__ import annotations

import math

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.overload import Client

TOKEN = b'data: {"choices":[{"text":"a","finish_reason":"length"}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "has_token", "whole"),
    [
        (b": waiting\n\n" + TOKEN + b"data: [DONE]\n\n", True, True),
        (b": waiting\n\n: waiting\n\n", False, False),
        (b"", False, False),
    ],
)
async def test_a_sign_of_life_is_no_first_token(answer: bytes, has_token: bool, whole: bool) -> None:
    """A stream that waits gets comments, which clients skip."""

    async def complete(request: web.Request) -> web.Response:
        return web.Response(body=answer, content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        outcome = await Client(session, str(server.make_url("")).rstrip("/"), "m", seed=1).ask(0.0)
    assert (math.isfinite(outcome.first_token_s), outcome.whole) == (has_token, whole)
