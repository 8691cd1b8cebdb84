"""KV events of a simulated engine: vLLM's wire format and sockets (publish, replay), on the engine's own event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Hashable, Sequence, Set

import msgspec
import zmq
import zmq.asyncio

from kv_transfer.events import END_OF_REPLAY, AllBlocksCleared, BlockRemoved, BlockStored, EventBatch

KEPT_BATCHES = 10_000
"""Batches kept for replay, as vLLM's default."""


class EventPublisher:
    """Publishes a simulated engine's news of its blocks; `start` before anything else."""

    def __init__(self) -> None:
        self.endpoint = self.replay_endpoint = ""
        self._batches: deque[tuple[int, bytes]] = deque(maxlen=KEPT_BATCHES)
        self._count = 0
        self._publish: zmq.asyncio.Socket | None = None
        self._replay: zmq.asyncio.Socket | None = None
        self._answering: asyncio.Task[None] | None = None

    def start(self, host: str) -> None:
        """Listen on two free ports of `host`."""
        context = zmq.asyncio.Context.instance()
        self._publish, self._replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        ends = []
        for socket in (self._publish, self._replay):
            socket.linger = 0
            socket.bind(f"tcp://[{host}]:0" if ":" in host else f"tcp://{host}:0")
            ends.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self.endpoint, self.replay_endpoint = ends
        self._answering = asyncio.get_running_loop().create_task(self._answer(self._replay))

    def tell(self, events: Sequence[BlockStored | BlockRemoved | AllBlocksCleared]) -> None:
        """Publish a batch; never blocks."""
        if self._publish is None or not events:
            return
        payload = msgspec.msgpack.encode(EventBatch(time.time(), list(events)))
        self._batches.append((self._count, payload))
        # A PUB socket drops what nobody takes: sending is never waited for.
        self._publish.send_multipart([b"", self._count.to_bytes(8, "big"), payload])
        self._count += 1

    def close(self) -> None:
        """Stop; safe to call twice."""
        if self._answering is not None:
            self._answering.cancel()
        for socket in (self._publish, self._replay):
            if socket is not None:
                socket.close()
        self._publish = None

    async def _answer(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            client, _, start = await socket.recv_multipart()
            for number, payload in list(self._batches):
                if number >= int.from_bytes(start, "big"):
                    await socket.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])
            await socket.send_multipart([client, b"", b"", END_OF_REPLAY, b""])


def runs(
    keys: Sequence[int],
    stored: Set[Hashable],
    tokens: Sequence[int],
    block_tokens: int,
    lora: str | None,
    salt: str | None,
) -> list[BlockStored]:
    """Events for those of a prompt's blocks that are `stored` now: one for each run of neighbours.

    Args:
        keys: the engine's hashes of the prompt's full blocks.
        tokens: the prompt.
    """
    events: list[BlockStored] = []
    for place, key in enumerate(keys):
        if key not in stored:
            continue
        if not (place and keys[place - 1] in stored):
            parent = keys[place - 1] if place else None
            events.append(BlockStored([], parent, [], block_tokens, "GPU", lora, []))
        run = events[-1]
        run.block_hashes.append(key)
        run.token_ids.extend(tokens[place * block_tokens : (place + 1) * block_tokens])
        if run.extra_keys is not None:
            run.extra_keys.append([extra for extra in (lora, salt if place == 0 else None) if extra])
    return events
