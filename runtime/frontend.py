"""vLLM's own OpenAI front end over the cluster: one FastAPI app, used by Ray Serve and by KServe alike."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.engine.arg_utils import FlexibleArgumentParser
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from decode.request import without_kv_params
from runtime.cluster import Cluster
from runtime.config import Config
from runtime.errors import STATUS, openai_body
from runtime.fleet import Fleet
from runtime.warmup import Warmer

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from vllm.config import VllmConfig

logger = logging.getLogger("baton.frontend")

OPEN_PATHS = ("/health", "/ping", "/metrics", "/version")
"""Paths that need no API key: probes and scrapers have none, and nothing there is a secret."""

CLOSED_PATHS = ("/scale_elastic_ep", "/is_scaling_elastic_ep")
"""vLLM's routes that change an engine's processes; the fleet is Ray Serve's to change."""


KEEP_ALIVE_S = 15.0
"""A stream that has been silent for this long gets a comment, which clients skip (server-sent events, WHATWG)."""


class FrontEndLLM(AsyncLLM):
    """vLLM's `AsyncLLM` whose engine core is the cluster."""

    @classmethod
    def over(cls, cluster: Cluster, config: VllmConfig) -> FrontEndLLM:
        """Build the front end over `cluster`. The one place where our client is put in for vLLM's own."""
        # vLLM would close all handlers of this process, and with them Ray Serve's log.
        config.logging_config.configure_logging = False
        with mock.patch.object(EngineCoreClient, "make_async_mp_client", staticmethod(lambda **_: cluster)):
            return cls(config, Executor.get_class(config), log_stats=True, log_requests=False)

    @property
    def cluster(self) -> Cluster:
        """The engine core, by its right name."""
        cluster: Cluster = self.engine_core
        return cluster

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, but without KV parameters of a client's own."""
        if isinstance(params, SamplingParams):
            params = without_kv_params(params)
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

    async def check_health(self) -> None:
        """Healthy means that both pools can serve. `/health` answers 503 otherwise."""
        if not self.cluster.fleet.ready():
            raise EngineDeadError()


@dataclass(frozen=True)
class FrontEnd:
    """A running front end: the app to serve, and what to stop.

    Attributes:
        app: vLLM's FastAPI app, for mounting elsewhere.
        asgi: the same behind its edge (API keys, body limit): what a server serves.
    """

    app: FastAPI
    asgi: ASGIApp
    llm: FrontEndLLM
    warmer: Warmer

    def shutdown(self) -> None:
        """Stop; the workers abort what was ours."""
        self.warmer.stop()
        self.llm.shutdown()


async def start_front_end(config: Config, handles: dict[str, DeploymentHandle]) -> FrontEnd:
    """Connect to both pools, warm every path through them, and return the app once both can serve."""
    front_end = uuid.uuid4().hex
    prefill_is_up = handles["prefill"].call.remote(None, "state", [])
    vllm_config = await handles["decode"].describe.remote(None)
    await prefill_is_up
    cluster = Cluster(config.limits)
    cluster.fleet = Fleet(front_end, handles, cluster.on_outputs, cluster.on_lost, cluster.ledger.outstanding)
    llm = FrontEndLLM.over(cluster, vllm_config)
    cluster.fleet.follow(config.name)
    warmer = Warmer(llm, cluster)
    warmer.start()
    await asyncio.wait_for(warmer.both_pools(), config.limits.start_timeout_s)
    app = await _build_app(config, llm)
    edge = Edge(app, max_body_bytes=config.front_end.max_body_bytes, api_keys=config.api_keys())
    return FrontEnd(app, edge, llm, warmer)


async def _build_app(config: Config, llm: FrontEndLLM) -> FastAPI:
    args = _server_args(config)
    app = build_app(args, ("generate",), llm.model_config)
    await init_app_state(llm, app.state, args, ("generate",))
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") not in CLOSED_PATHS]
    return app


def _server_args(config: Config) -> Any:
    """The namespace that vLLM's server would have made of its command line."""
    settings = config.front_end
    line = ["--model", config.engine_settings("decode").model, "--served-model-name", config.model_name]
    for name in ("reasoning_parser", "chat_template"):
        if value := getattr(settings, name):
            line += [f"--{name.replace('_', '-')}", value]
    if settings.tool_call_parser:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    line += ["--enable-prompt-tokens-details", *settings.args]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(line)


class BodyTooLarge(Exception):
    """The body went over the limit while it was read."""


class Edge:
    """What a client meets first: API keys, the limit on the body, and a sign of life in streams that wait.

    Plain ASGI, so that streams pass untouched.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, api_keys: Sequence[str]) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._keys = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it in OpenAI's shape."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.lower(): value for key, value in scope["headers"]}
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._keys and scope["method"] != "OPTIONS" and path not in OPEN_PATHS and not self._known(headers):
            await _refuse(send, "unauthorized", "This server needs an API key: send `Authorization: Bearer KEY`.")
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            await self._too_large(send)
            return
        exchange = _Exchange(receive, send, self._max_body_bytes)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except BodyTooLarge:
            logger.debug("a body went over the limit")
        finally:
            exchange.close()
        if exchange.refused:
            await self._too_large(send)

    async def _too_large(self, send: Send) -> None:
        await _refuse(
            send, "body_too_large", f"The body is larger than this server's limit of {self._max_body_bytes} bytes."
        )

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")  # what Anthropic's clients send
        digest = hashlib.sha256(key.strip()).digest()
        # No early exit: the time must not tell which key came near.
        return sum(hmac.compare_digest(digest, known) for known in self._keys) > 0


class _Exchange:
    """One request and its response on their way through the edge."""

    def __init__(self, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self._receive, self._send, self._room = receive, send, max_body_bytes
        self._started = False
        self._sent = 0.0
        self._keeper: asyncio.Task[None] | None = None

    @property
    def refused(self) -> bool:
        """Whether the body was too large and nothing has been answered yet."""
        return self._room < 0 and not self._started

    async def receive(self) -> Message:
        """Count what comes; a body without a declared length may turn out too large."""
        message = await self._receive()
        self._room -= len(message.get("body", b""))
        if self._room < 0:
            raise BodyTooLarge
        return message

    async def send(self, message: Message) -> None:
        """Pass on what the app sends, unless it is the 500 that it makes of a refused body."""
        if self.refused:
            return
        if not self._started:
            self._started = True
            if any(name == b"content-type" and b"text/event-stream" in value for name, value in message["headers"]):
                self._keeper = asyncio.get_running_loop().create_task(self._keep_alive())
        self._sent = time.monotonic()
        await self._send(message)

    async def _keep_alive(self) -> None:
        """Send a comment while a stream waits, for a replacement of its worker perhaps: idle connections get cut."""
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            if time.monotonic() - self._sent >= KEEP_ALIVE_S:
                await self._send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})

    def close(self) -> None:
        """The app is done."""
        if self._keeper is not None:
            self._keeper.cancel()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


async def _refuse(send: Send, reason: str, message: str) -> None:
    body = json.dumps(openai_body(reason, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"x-baton-refusal", reason.encode()))
    if STATUS[reason] == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": STATUS[reason], "headers": headers})
    await send({"type": "http.response.body", "body": body})
