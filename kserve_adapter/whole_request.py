"""What KServe's own routes lack: a limit on the body, and an end of the work when its client leaves."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SUFFIXES = (":predict", ":explain", "/infer")
"""The paths that do work; the OpenAI front end has an edge of its own."""


class WholeRequest:
    """Reads a request whole before KServe sees it, then runs it for as long as its client is there. Plain ASGI."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, or refuse a body that is too large."""
        if scope["type"] != "http" or not scope["path"].endswith(SUFFIXES):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                text = f"The body is larger than this server's limit of {self._max_body_bytes} bytes."
                await JSONResponse({"error": text}, 413)(scope, receive, send)
                return
            if not message.get("more_body"):
                break
        await self._while_connected(scope, bytes(body), receive, send)

    async def _while_connected(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        gone = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work = asyncio.ensure_future(self._app(scope, replay, send))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
                return
            await work
        finally:
            watcher.cancel()
            work.cancel()


class HeedsCancel:
    """Tells an app that its client has left when a call is cancelled: vLLM's routes heed nothing else. Plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; a cancelled call ends once the app has."""
        gone = asyncio.Event()

        async def receive_while_there() -> Message:
            if gone.is_set():
                return {"type": "http.disconnect"}
            waits: set[asyncio.Future[Any]] = {asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())}
            try:
                (first, *_), _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                return {"type": "http.disconnect"} if gone.is_set() else first.result()
            finally:
                for each in waits:
                    each.cancel()

        work = asyncio.ensure_future(self._app(scope, receive_while_there, send))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            gone.set()
            await asyncio.gather(work, return_exceptions=True)
            raise
