"""What a client meets first: API keys, the limit on the body, refusals, and a sign of life in streams that wait.

Plain ASGI around vLLM's app. This is the one place where a refusal becomes a response, in the shape that the API's
clients expect. vLLM's app begins a streamed response before the engine has seen the request; so the beginning is held
back until the request was let in or refused (`runtime.visit`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import VLLMClientError

from runtime.errors import STATUS, Refusal, anthropic_body, openai_body, retry_after
from runtime.insight import INSIGHT_PATHS
from runtime.metrics import REFUSALS
from runtime.visit import Reception, Visit, current_visit

logger = logging.getLogger("baton.edge")

OPEN_PATHS = ("/health", "/ping", "/metrics", "/version")
"""Paths that need no API key: probes and scrapers have none, and nothing there is a secret."""

KEEP_ALIVE_S = 15.0
"""A stream that has been silent for this long gets a comment, which clients skip (server-sent events, WHATWG)."""

TOO_LONG = "maximum context length"
"""What vLLM's refusals of too long prompts have in common; they have no type of their own."""


class BodyTooLarge(Exception):
    """The body went over the limit while it was read."""


class Edge:
    """The app behind its edge.

    Args:
        max_requests: so many POST requests are open at a time; more are refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        api_keys: Sequence[str],
        reception: Reception,
        max_requests: int = 4096,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_requests = max_requests
        self._open = 0
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._reception = reception

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            visit = self._visit(scope, path)
        except Refusal as refusal:
            REFUSALS.labels(reason=refusal.reason).inc()
            await _refuse(send, path, refusal)
            return
        posted = scope["method"] == "POST"
        exchange = _Exchange(receive, send, self._max_body_bytes, visit, posted)
        token = current_visit.set(visit)
        self._open += posted
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.refused:
                logger.debug("the app failed over a refused request", exc_info=True)
            elif isinstance(error.__cause__, (ValueError, VLLMClientError)) and not visit.started:
                # vLLM answers 400 for it elsewhere. Here it had begun a stream, whose start we hold.
                visit.refuse(Refusal("malformed", f"The request can't be answered: {error.__cause__}"))
            else:
                raise
        finally:
            self._open -= posted
            current_visit.reset(token)
            exchange.close()
        if visit.refusal is not None and not visit.started:
            await _refuse(send, path, visit.refusal)
        else:
            await exchange.flush()

    def _visit(self, scope: Scope, path: str) -> Visit:
        headers = {key.lower(): value for key, value in scope["headers"]}
        key = _key(headers)
        if self._keys and scope["method"] != "OPTIONS" and path not in OPEN_PATHS and not self._known(key):
            raise Refusal("unauthorized", "This server needs an API key: send `Authorization: Bearer KEY`.")
        if path in INSIGHT_PATHS and not self._keys and not _is_local(scope, headers):
            raise Refusal("local_only", "Without API keys this is told on the server's own machine only.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        if scope["method"] == "POST" and self._open >= self._max_requests:
            raise Refusal("overloaded", "This front end has as many open requests as it may have.", 1.0)
        return self._reception.visit(headers, _digest(key) if key else None)

    def _known(self, key: bytes) -> bool:
        digest = _digest(key)
        # No early exit: the time must not tell which key came near.
        return sum(hmac.compare_digest(digest, known) for known in self._keys) > 0


def _is_local(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether a request comes from this machine itself, and not over a proxy on it."""
    if b"x-forwarded-for" in headers or b"forwarded" in headers or not scope.get("client"):
        return False
    try:
        return ipaddress.ip_address(scope["client"][0]).is_loopback
    except ValueError:
        return False


class _Exchange:
    """One request and its response on their way through the edge."""

    def __init__(self, receive: Receive, send: Send, max_body_bytes: int, visit: Visit, asks_for_work: bool) -> None:
        self._receive, self._send = receive, send
        self._limit = self._room = max_body_bytes
        self._visit = visit
        self._asks_for_work = asks_for_work
        self._held: list[Message] = []
        self._sending = asyncio.Lock()
        self._sent = time.monotonic()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def refused(self) -> bool:
        """Whether there is a refusal, and nothing has been answered yet."""
        return self._visit.refusal is not None and not self._visit.started

    async def receive(self) -> Message:
        """Count what comes; a body without a declared length may turn out too large."""
        message = await self._receive()
        self._room -= len(message.get("body", b""))
        if self._room < 0:
            self._visit.refuse(_too_large(self._limit))
            raise BodyTooLarge
        return message

    async def send(self, message: Message) -> None:
        """Pass on what the app sends, or hold it until there is something to say and the request was let in.

        What the app makes of a refusal goes nowhere.
        """
        if self.refused:
            return
        if self._visit.started:
            await self._pass(message)
            return
        self._held.append(message)
        if message["type"] == "http.response.start":
            if _is_stream(message):
                self._keeper = asyncio.get_running_loop().create_task(self._keep_alive())
        elif self._is_error():
            if not message.get("more_body", False) and (refusal := _too_long(self._held)):
                self._visit.refuse(refusal)
        elif not self._undecided():
            await self.flush()

    async def flush(self) -> None:
        """Begin the response with what was held."""
        self._visit.started = True
        async with self._sending:
            while self._held:
                await self._send(self._held.pop(0))

    def close(self) -> None:
        """The app is done."""
        if self._keeper is not None:
            self._keeper.cancel()

    def _is_error(self) -> bool:
        return self._asks_for_work and self._held[0].get("status") == 400

    def _undecided(self) -> bool:
        """Whether this stream may still be refused: it asks for work, and has not been let in."""
        return self._keeper is not None and self._asks_for_work and not self._visit.admitted

    async def _pass(self, message: Message) -> None:
        async with self._sending:
            self._sent = time.monotonic()
            await self._send(message)

    async def _keep_alive(self) -> None:
        """Send a comment while a stream waits, for a replacement of its worker perhaps: idle connections get cut."""
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            if time.monotonic() - self._sent >= KEEP_ALIVE_S and not self._undecided() and not self.refused:
                await self.flush()
                await self._pass({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and b"text/event-stream" in value for name, value in start["headers"])


def _too_long(messages: list[Message]) -> Refusal | None:
    """vLLM's refusal of a prompt over the window as a typed one, if this is that."""
    body = b"".join(message.get("body", b"") for message in messages)
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return None
    return Refusal("context_length_exceeded", message) if TOO_LONG in message else None


def _too_large(limit: int) -> Refusal:
    return Refusal("body_too_large", f"The body is larger than this server's limit of {limit} bytes.")


def _key(headers: dict[bytes, bytes]) -> bytes:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        key = headers.get(b"x-api-key", b"")  # what Anthropic's clients send
    return key.strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _refuse(send: Send, path: str, refusal: Refusal) -> None:
    shape: Any = anthropic_body if path.startswith("/v1/messages") else openai_body
    body = json.dumps(shape(refusal)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"x-baton-refusal", refusal.reason.encode()))
    if STATUS[refusal.reason] == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if (seconds := retry_after(refusal)) is not None:
        headers.append((b"retry-after", str(seconds).encode()))
    await send({"type": "http.response.start", "status": STATUS[refusal.reason], "headers": headers})
    await send({"type": "http.response.body", "body": body})
