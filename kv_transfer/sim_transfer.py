"""How simulated engines hand KV over: prefill listens, decode pulls or says that it won't. JSON lines on TCP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

LINE_LIMIT = 64 * 1024
ANSWER_TIMEOUT_S = 5.0

RELEASE_TIMEOUT_S = 120.0
"""Nobody waits for a release, and a prefill engine that stands still for a while has to hear of it afterwards."""

Settle = Callable[[str], int | None]
"""Frees the blocks of a finished prefill by its request id; tokens handed over, or None when there are none."""


class TransferServer:
    """The prefill side: gives up the blocks of one engine to whoever names it and the request."""

    def __init__(self, engine_id: str, settle: Settle) -> None:
        self._engine_id = engine_id
        self._settle = settle
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> int:
        """Listen on a free port of `host` and return it."""
        # In two steps: a cancel while it starts to serve would leave a socket that nobody knows of.
        self._server = await asyncio.start_server(self._serve, host, 0, limit=LINE_LIMIT, start_serving=False)
        await self._server.start_serving()
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError, asyncio.TimeoutError):
            line = await asyncio.wait_for(reader.readline(), RELEASE_TIMEOUT_S)
            writer.write(json.dumps(self._answer(json.loads(line))).encode() + b"\n")
            await writer.drain()
        writer.close()

    def _answer(self, asked: Any) -> dict[str, Any]:
        if not isinstance(asked, dict) or asked.get("engine_id") != self._engine_id:
            return {"ok": False, "error": "another engine"}
        tokens = self._settle(str(asked.get("request_id")))
        return {"ok": False, "error": "no such blocks"} if tokens is None else {"ok": True, "num_tokens": tokens}


async def settle_remote(params: dict[str, Any], timeout_s: float = ANSWER_TIMEOUT_S) -> bool:
    """Tell the prefill engine that its blocks were pulled, or that nobody will; False when it has none to give."""
    try:
        asked = {"engine_id": params["remote_engine_id"], "request_id": params["remote_request_id"]}
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(
                params["remote_host"], params["remote_port"], limit=LINE_LIMIT
            )
            try:
                writer.write(json.dumps(asked).encode() + b"\n")
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
    except (OSError, ValueError, KeyError, TimeoutError):  # a KeyError: parameters that lead nowhere
        return False
    return bool(answer.get("ok"))
