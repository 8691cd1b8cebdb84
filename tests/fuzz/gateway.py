"""The real front end over simulated engines in this process, and a client that speaks ASGI to it and may hang up."""

from __future__ import annotations

import asyncio
import re
import threading
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.config import Config
from runtime.config_file import load
from runtime.frontend import FrontEnd
from tests.chaos.fabric import ROLES, Fabric
from tests.chaos.handles import Handle
from tests.conftest import MODEL, ROOT

T = TypeVar("T")

WINDOW_TOKENS = 512
"""Short, so that an answer without a limit is over soon."""

PATIENCE_S = 10.0
"""A request that is not over by then is left by its client."""

LEAVING_S = 10.0
"""A request whose client has left must be over by then."""

SERVER_FAULT = re.compile(r'"(?:code|status)": ?5\d\d|InternalServerError')
"""How vLLM says in a stream that has begun what would have been a 5xx before."""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: of the response; 0 when there was none before the client left.
        fault: the traceback of an exception that went through the app, if one did.
        left: the client lost its patience.
    """

    status: int
    body: bytes
    fault: str = ""
    left: bool = False

    @property
    def server_fault(self) -> str | None:
        """What was the server's fault with it, if anything."""
        if self.fault or (self.status >= 500 and self.status != 501):  # 501: an endpoint that this model has not
            return f"{self.status} {self.body[:300]!r} {self.fault}"
        found = SERVER_FAULT.search(self.body.decode(errors="replace")) if self.body.startswith(b"data:") else None
        return None if found is None else f"in a stream: {self.body[max(0, found.start() - 300) :][:600]!r}"


class Gateway:
    """A front end whose engines are fast, on an event loop of its own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.fabric: Fabric
        self.front_end: FrontEnd

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the gateway's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Gateway]:
        """A gateway until the block ends."""
        gateway = cls()
        gateway._thread.start()
        gateway.run(gateway._start(load(ROOT / "deploy/config/sim.yaml")))
        yield gateway
        gateway.run(gateway._stop())
        gateway._loop.call_soon_threadsafe(gateway._loop.stop)
        gateway._thread.join()

    async def _start(self, config: Config) -> None:
        from runtime.frontend import start_front_end

        model = Path(config.engine_settings("decode").model)
        self.fabric = Fabric(model, 1, 2, hang_s=60, application=config.name, window_tokens=WINDOW_TOKENS)
        await self.fabric.start()
        handles: Any = {role: Handle(self.fabric, role) for role in ROLES}
        self.front_end = await start_front_end(config, handles, token=self.fabric.token)

    async def _stop(self) -> None:
        self.front_end.shutdown()
        await self.fabric.settle()
        await self.fabric.close()

    async def send(self, method: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
        """One request, given up after `PATIENCE_S`.

        Raises:
            TimeoutError: it goes on although its client has left.
        """
        exchange = _Exchange(body)
        sent = {"content-type": "application/json", "host": "baton", **(headers or {})}
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in sent.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        task = asyncio.ensure_future(self.front_end.asgi(scope, exchange.receive, exchange.send))  # type: ignore[arg-type]
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        if not done:
            exchange.left.set()
            done, _ = await asyncio.wait({task}, timeout=LEAVING_S)
            if not done:
                raise TimeoutError(f"{method} {path} goes on {LEAVING_S} s after its client left")
        error = None if task.cancelled() else task.exception()
        fault = "".join(traceback.format_exception(_first(error))[-6:]) if error else ""
        return Answer(exchange.status, bytes(exchange.body), fault, exchange.left.is_set())

    async def left_behind(self) -> dict[str, Any]:
        """What is still held or outstanding; empty when nothing is."""
        cluster = self.front_end.llm.cluster
        return {
            name: value
            for name, value in {
                "blocks": self.fabric.blocks_held(),
                "handoffs": dict(cluster.ledger.outstanding()),
                "leases": self.fabric.leases_expired(),
                "live requests": list(cluster._live),
                "legs": [leg.id for leg in cluster.legs.by_id.values() if not leg.abandoned],
                "outputs awaited": list(self.front_end.llm.output_processor.request_states),
                "dead": [w.engine.facts.role for w in self.fabric.workers() if w._dead],
                "missing": [role for role in ROLES if len(self.fabric.pools[role]) != 2],
            }.items()
            if value
        }

    async def settled(self, within_s: float) -> dict[str, Any]:
        """What is left behind after a while; returns as soon as nothing is."""
        for _ in range(int(within_s / 0.05)):
            if not await self.left_behind():
                break
            await asyncio.sleep(0.05)
        return await self.left_behind()


class _Exchange:
    """One request's ASGI channels; setting `left` is the client's disconnect."""

    def __init__(self, body: bytes) -> None:
        self.status, self.body = 0, bytearray()
        self.left = asyncio.Event()
        self._request: bytes | None = body

    async def receive(self) -> dict[str, Any]:
        """The body, then nothing until the client leaves."""
        if self._request is not None:
            body, self._request = self._request, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        """Collect the answer."""
        if self.left.is_set():
            return  # as uvicorn does
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif len(self.body) < 4_000_000:
            self.body += message.get("body", b"")


QUESTION = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
"""A request whose answer shows that all is well."""


def _first(error: BaseException) -> BaseException:
    """What an exception began with."""
    while (cause := error.__cause__) is not None:
        error = cause
    return error
