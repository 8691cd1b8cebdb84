"""What the front end tells of the fleet when somebody scrapes: its own families and those of every worker, in one text.

Workers' texts are taken from their own endpoints and given the labels `worker` and `pool`, line by line: a hundred
workers are some ten thousand lines, and parsing each into objects would cost more than everything else of a scrape.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import Metric
from starlette.types import Receive, Scope, Send

from kv_transfer.engine import EngineFacts
from kv_transfer.worker_endpoint import is_engine_family

logger = logging.getLogger("baton.metrics")

FETCH_TIMEOUT_S = 2.0
"""A worker that does not answer a scrape within this time is left out of it."""

AT_ONCE = 16
"""So many workers are asked at the same time."""

FRESH_S = 1.0
"""Workers' texts serve all scrapes within this time: two Prometheus servers cost what one does."""

HEAD_LINES = 2
"""A family begins with its help and its type."""

PAUSE_LINES = 2000
"""Other work gets its turn after so many lines: a scrape must not be seen as a gap in a stream."""

Fetch = Callable[[str, int], Awaitable[str]]


class _FrontEndOnly:
    """The process's own families without those of engine cores: vLLM's front end knows none, and says 0."""

    def collect(self) -> Iterator[Metric]:
        """Prometheus' hook for a scrape."""
        return (family for family in REGISTRY.collect() if not is_engine_family(family.name))


class FleetMetrics:
    """The ASGI app behind `/metrics`.

    Args:
        workers: the facts of the workers that are linked now.
        front_ends: id, host and port of each front end that can be scraped alone.
        me: the id of this front end.
        fetch: gets a text from host and port.
    """

    def __init__(
        self,
        workers: Callable[[], Iterable[EngineFacts]],
        front_ends: Callable[[], Iterable[tuple[str, str, int]]],
        me: str,
        fetch: Fetch | None = None,
    ) -> None:
        self._workers = workers
        self._front_ends = front_ends
        self._me = me
        self._fetch = fetch or fetch_text
        self._own = CollectorRegistry()
        self._own.register(_FrontEndOnly())  # type: ignore[arg-type]  # a collector by its method
        self._fresh_until = 0.0
        self._text = ""
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a scrape."""
        if time.monotonic() >= self._fresh_until:
            async with self._lock:
                if time.monotonic() >= self._fresh_until:
                    self._text = await self._gather()
                    self._fresh_until = time.monotonic() + FRESH_S
        body = self._text.encode()
        headers = [(b"content-type", CONTENT_TYPE_LATEST.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _gather(self) -> str:
        """The families of this front end, of the others, and of all workers: whoever answers, each family once."""
        own = (await asyncio.to_thread(generate_latest, self._own)).decode()
        others = [front_end for front_end in self._front_ends() if front_end[2] and front_end[0] != self._me]
        asked = [(f'front_end="{name}"', host, port) for name, host, port in others]
        asked += [
            (f'worker="{facts.engine_id}",pool="{facts.role}"', facts.kv_host, facts.metrics_port)
            for facts in self._workers()
            if facts.metrics_port
        ]
        places = asyncio.Semaphore(AT_ONCE)
        texts = await asyncio.gather(*(self._ask(host, port, places) for _, host, port in asked))
        # Also where there is no other: a series that changed its labels when one came would begin anew.
        mine = f'front_end="{self._me}"'
        return await merged([(mine, own), *zip((labels for labels, _, _ in asked), texts, strict=True)])

    async def _ask(self, host: str, port: int, places: asyncio.Semaphore) -> str:
        async with places:
            try:
                async with asyncio.timeout(FETCH_TIMEOUT_S):
                    return await self._fetch(host, port)
            except (OSError, TimeoutError, ValueError) as error:
                logger.warning("%s:%d did not tell its metrics: %r", host, port, error)
                return ""


def serve_alone() -> tuple[str, int]:
    """Serve this front end's own families, for the others to gather; returns host and port."""
    import ray

    registry = CollectorRegistry()
    registry.register(_FrontEndOnly())  # type: ignore[arg-type]  # a collector by its method
    host = ray.util.get_node_ip_address()
    server, _ = start_http_server(0, addr=host, registry=registry)
    return host, int(server.server_port)


async def fetch_text(host: str, port: int) -> str:
    """GET http://HOST:PORT/metrics; a dozen lines instead of a client that costs ten times as much.

    Raises:
        OSError: nobody there.
        ValueError: something else than metrics came.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET /metrics HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        await writer.drain()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise ValueError(head[:100])
    return body.decode()


async def merged(texts: Iterable[tuple[str, str]]) -> str:
    """Texts as one, each with labels for all of its lines (as they stand between the braces)."""
    heads: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    done = 0
    for labels, text in texts:
        family: list[str] = []
        for line in text.splitlines():
            if line.startswith("#"):
                name = line.split(" ", 3)[2]
                family = lines.setdefault(name, [])
                head = heads.setdefault(name, [])
                if not family and len(head) < HEAD_LINES:
                    head.append(line)
            elif line:
                family.append(_labelled(line, labels))
            done += 1
            if done % PAUSE_LINES == 0:
                await asyncio.sleep(0)
    return "".join("\n".join([*heads[name], *lines[name]]) + "\n" for name in heads)


def _labelled(line: str, labels: str) -> str:
    name, brace, rest = line.partition("{")
    if brace:
        return f"{name}{{{labels},{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{labels}}} {value}"
