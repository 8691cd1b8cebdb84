"""KV events over real ZMQ, published by vLLM's own publisher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

from kv_transfer.block_keys import prompt_keys
from kv_transfer.events import EventFeed, apply
from kv_transfer.index import PrefixIndex
from kv_transfer.nixl import free_port

B = 4
TOKENS = list(range(40))


def store(start: int, end: int, **more: Any) -> BlockStored:
    """Blocks `start` to `end` of `TOKENS`."""
    fields: dict[str, Any] = {"lora_id": None, "medium": "GPU", "lora_name": None, **more}
    return BlockStored(
        block_hashes=[f"h{number}".encode() for number in range(start, end)],
        parent_block_hash=f"h{start - 1}".encode() if start else None,
        token_ids=TOKENS[start * B : end * B],
        block_size=B,
        **fields,
    )


def remove(number: int, medium: str = "GPU") -> BlockRemoved:
    """One block of `TOKENS`."""
    return BlockRemoved(block_hashes=[f"h{number}".encode()], medium=medium)


def held(index: PrefixIndex, **extra: Any) -> int:
    """Tokens of `TOKENS` that worker `w` holds."""
    return int(index.match(prompt_keys(TOKENS, B, **extra), 0.0).get("w", 0))


def batch(*events: Any) -> KVEventBatch:
    """The events of one step."""
    return KVEventBatch(ts=time.time(), events=list(events))


CASES: list[tuple[str, list[Any], int]] = [
    ("stored", [store(0, 3), store(3, 5)], 20),
    ("removed", [store(0, 3), remove(2)], 8),
    ("cleared", [store(0, 3), AllBlocksCleared()], 0),
    ("an offloaded copy", [store(0, 3, medium="CPU")], 0),
    ("the end of an offloaded copy", [store(0, 3), remove(0, "CPU")], 12),
    ("another cache group", [store(0, 3, group_idx=0), store(0, 5, group_idx=1)], 12),
    ("with an extra key", [store(0, 3, extra_keys=[("salt",), None, None])], 0),
]


@pytest.mark.parametrize(("events", "tokens"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_vllm_events(events: list[Any], tokens: int) -> None:
    """What each of vLLM's records does to the index."""
    index = PrefixIndex(B)
    apply(index, "w", msgspec.msgpack.encode(batch(*events)))
    assert held(index) == tokens


def test_blocks_of_a_salted_lora_request() -> None:
    """Salt and adapter as vLLM writes them are found by a prompt with both."""
    index = PrefixIndex(B)
    extra = [("fr", "salt"), ("fr",), ("fr",)]
    apply(index, "w", msgspec.msgpack.encode(batch(store(0, 3, lora_name="fr", extra_keys=extra))))
    assert held(index, lora="fr", salt="salt") == 12
    assert held(index, lora="fr") == held(index, salt="salt") == held(index) == 0


class Publisher:
    """vLLM's publisher on loopback."""

    def __init__(self, replay: bool = True, buffer_steps: int = 100) -> None:
        self.endpoint = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
        self.replay_endpoint = f"tcp://127.0.0.1:{free_port('127.0.0.1')}" if replay else None
        self.publisher = ZmqEventPublisher(
            0, self.endpoint.replace("127.0.0.1", "*"), self.replay_endpoint, buffer_steps
        )

    def publish(self, *events: Any) -> None:
        """One step's events."""
        self.publisher.publish(batch(*events))

    def lose(self, count: int) -> None:
        """Skip sequence numbers, as if messages got lost."""
        for _ in range(count):
            next(self.publisher._seq_gen)


@pytest.fixture
def publishers() -> Iterator[list[Publisher]]:
    """Publishers that are shut down at the end."""
    made: list[Publisher] = []
    yield made
    for one in made:
        one.publisher.shutdown()


async def until(check: Callable[[], bool]) -> None:
    """Wait for something to come true."""
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.01)


async def publish_until(check: Callable[[], bool], worker: Publisher, *events: Any) -> None:
    """Publish the same again and again, until the subscription is up and something has come true."""
    async with asyncio.timeout(10):
        while not check():
            worker.publish(*events)
            await asyncio.sleep(0.05)


async def stop(task: asyncio.Task[None]) -> None:
    """End a feed."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_feed_replays_what_was_before_and_follows(publishers: list[Publisher]) -> None:
    """A front end that comes late learns what the worker holds; when the feed ends, the worker is forgotten."""
    publishers.append(worker := Publisher())
    worker.publish(store(0, 2))
    index = PrefixIndex(B)
    feed = EventFeed(index, "w", worker.endpoint, worker.replay_endpoint)
    task = asyncio.create_task(feed.run())
    await until(lambda: held(index) == 8)
    worker.publish(store(2, 3))  # if the subscription is not up yet, the next one shows the gap
    await publish_until(lambda: held(index) == 16, worker, store(3, 4))
    worker.publish(remove(0))
    await until(lambda: held(index) == 0)
    assert feed.gaps == 0
    assert len(index) == 3
    await stop(task)
    assert len(index) == 0


async def test_gap_that_replay_fills(publishers: list[Publisher]) -> None:
    """Batches that this feed missed and the publisher still has."""
    publishers.append(worker := Publisher())
    worker.publish(store(0, 1))
    index = PrefixIndex(B)
    feed = EventFeed(index, "w", worker.endpoint, worker.replay_endpoint)
    task = asyncio.create_task(feed.run())
    await until(lambda: held(index) == 4)
    await publish_until(lambda: held(index) == 8, worker, store(1, 2))
    missed = feed._next
    for number in range(2, 5):
        worker.publish(store(number, number + 1))
    await until(lambda: held(index) == 20)
    feed._next = missed  # as if the last three had not come
    index.remove("w", [f"h{number}".encode() for number in range(2, 5)])
    worker.publish(store(5, 6))
    await until(lambda: held(index) == 24)
    assert feed.gaps == 0
    await stop(task)


@pytest.mark.parametrize("replay", [True, False], ids=["replay has it no more", "no replay"])
async def test_gap_that_cannot_be_filled(publishers: list[Publisher], replay: bool) -> None:
    """What the worker held is forgotten; news count from there on."""
    publishers.append(worker := Publisher(replay))
    index = PrefixIndex(B)
    feed = EventFeed(index, "w", worker.endpoint, worker.replay_endpoint)
    task = asyncio.create_task(feed.run())
    await publish_until(lambda: held(index) == 12, worker, AllBlocksCleared(), store(0, 3))
    worker.lose(3)
    worker.publish(store(0, 2))
    await until(lambda: held(index) == 8)
    assert feed.gaps == 1
    await stop(task)


async def test_unreadable_batch(publishers: list[Publisher]) -> None:
    """An event of a kind that we don't know: forget and go on."""
    publishers.append(worker := Publisher())
    worker.publish(store(0, 3))
    index = PrefixIndex(B)
    feed = EventFeed(index, "w", worker.endpoint, worker.replay_endpoint)
    task = asyncio.create_task(feed.run())
    await until(lambda: held(index) == 12)
    worker.publish({"type": "BlockTeleported"})
    await publish_until(lambda: held(index) == 4, worker, store(0, 1))
    assert feed.gaps == 1
    await stop(task)


async def test_publisher_that_does_not_replay(publishers: list[Publisher], caplog: pytest.LogCaptureFixture) -> None:
    """A dead replay socket costs its time limit, once, and the feed goes on."""
    publishers.append(worker := Publisher(replay=False))
    index = PrefixIndex(B)
    nobody = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    feed = EventFeed(index, "w", worker.endpoint, nobody, replay_timeout_s=0.2)
    task, started = asyncio.create_task(feed.run()), time.monotonic()
    await publish_until(lambda: held(index) == 12, worker, store(0, 3))
    assert time.monotonic() - started >= 0.2
    worker.publish(store(3, 4))
    await until(lambda: held(index) == 16)
    assert feed.gaps == 0
    told = [record.getMessage() for record in caplog.records if record.name == "baton.events"]
    assert told == ["worker w does not replay its events"]
    await stop(task)
