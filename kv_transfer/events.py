"""KV events: a worker's news of its blocks, from vLLM's ZMQ publisher into the prefix index.

The records below are those of `vllm/distributed/kv_events.py` (0.32) as far as they matter here; msgspec skips the
rest. A message is topic, sequence number (8 bytes, big endian) and a msgpack batch. A gap in the numbers is filled from
the publisher's replay socket; where that can't be, what the worker holds is forgotten, and built anew from its news:
an index that knows too little costs a cache hit, one that knows what isn't so sends requests the wrong way.

`EventFeed.run` reads one worker for as long as it lives. An engine id is fresh for each incarnation, so that sequence
numbers never start anew within a feed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from kv_transfer.block_keys import EngineHash, StoredBlocks
from kv_transfer.index import PrefixIndex

logger = logging.getLogger("baton.events")

ON_DEVICE = (None, "GPU")
"""What vLLM calls the cache that a request can use at once (on CPU engines too); offloaded copies don't count."""

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
"""Sequence number of a replay's last message."""


class BlockStored(msgspec.Struct, tag=True):
    """Blocks that can be hit from now on."""

    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks that were evicted."""

    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """The whole prefix cache was reset."""


class EventBatch(msgspec.Struct, array_like=True):
    """The events of one engine step."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


_decoder = msgspec.msgpack.Decoder(EventBatch)


def apply(index: PrefixIndex, worker: str, payload: bytes) -> None:
    """Take a batch of a worker's events into the index.

    Of a model with several KV cache groups only the first counts: it covers every token, and the groups are filled
    together.

    Raises:
        msgspec.DecodeError: the payload is not a batch of events.
    """
    for event in _decoder.decode(payload).events:
        if isinstance(event, AllBlocksCleared):
            index.clear(worker)
        elif event.medium not in ON_DEVICE or event.group_idx:
            continue
        elif isinstance(event, BlockRemoved):
            index.remove(worker, event.block_hashes)
        else:
            index.add(worker, _stored(event))


def _stored(event: BlockStored) -> StoredBlocks:
    return StoredBlocks(
        hashes=event.block_hashes,
        parent=event.parent_block_hash,
        tokens=event.token_ids,
        block_tokens=event.block_size,
        lora=event.lora_name,
        extra_keys=event.extra_keys,
    )


class EventFeed:
    """Follows the events of one worker.

    Args:
        endpoint: ZMQ address where the worker publishes.
        replay_endpoint: ZMQ address of its replay socket; without one every gap means to forget.
        replay_timeout_s: longest wait for the next replayed batch.
    """

    def __init__(
        self,
        index: PrefixIndex,
        worker: str,
        endpoint: str,
        replay_endpoint: str | None = None,
        replay_timeout_s: float = 5.0,
    ) -> None:
        self.gaps = 0  # that replay did not fill
        self._index = index
        self._worker = worker
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._replay_timeout_s = replay_timeout_s
        self._next: int | None = None  # sequence number of the next batch

    async def run(self) -> None:
        """Feed the index until cancelled; the worker is forgotten at the end."""
        try:
            with zmq.asyncio.Context.instance().socket(zmq.SUB) as socket:
                socket.linger = 0
                socket.subscribe(b"")
                socket.connect(self._endpoint)
                await self._replay(0)
                while True:
                    _, number, payload = await socket.recv_multipart()
                    await self._take(int.from_bytes(number, "big"), payload)
        finally:
            self._index.forget(self._worker)

    async def _take(self, number: int, payload: bytes) -> None:
        if self._next is not None and number > self._next:
            await self._replay(self._next)
        self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> None:
        """Apply a batch unless it was before; forget what the worker holds when batches are missing."""
        if self._next is not None and number < self._next:
            return
        if self._next is not None and number > self._next:
            self._start_anew(f"batches {self._next} to {number - 1} are lost")
        self._next = number + 1
        try:
            apply(self._index, self._worker, payload)
        except msgspec.DecodeError as error:
            self._start_anew(f"batch {number} can't be read: {error}")

    def _start_anew(self, why: str) -> None:
        self.gaps += 1
        logger.warning("the cache of worker %s is forgotten: %s", self._worker, why)
        self._index.clear(self._worker)

    async def _replay(self, start: int) -> None:
        """Ask for all batches from `start` on; those that the publisher still has are applied."""
        if self._replay_endpoint is None:
            return
        # Not REQ: one question, many answers.
        with zmq.asyncio.Context.instance().socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(self._replay_endpoint)
            try:
                await socket.send_multipart([b"", start.to_bytes(8, "big")])
                while True:
                    async with asyncio.timeout(self._replay_timeout_s):
                        _, _, number, payload = await socket.recv_multipart()
                    if number == END_OF_REPLAY:
                        return
                    self._apply(int.from_bytes(number, "big"), payload)
            except TimeoutError:
                logger.warning("worker %s does not replay its events", self._worker)
