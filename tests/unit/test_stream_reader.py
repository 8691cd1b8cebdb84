"""Streams are read beside a busy event loop: in order, in few calls, to their end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

from runtime.stream_reader import StreamReader


class Stream:
    """Items that come without delay; then an error, an end, or nothing."""

    def __init__(self, items: int, then: BaseException | None = None, *, open_end: bool = False) -> None:
        self.items, self.then, self.open_end = items, then, open_end
        self.cancelled = threading.Event()
        self.read = threading.Event()

    async def __aiter__(self) -> AsyncIterator[int]:
        """As Ray's."""
        for item in range(self.items):
            yield item
            await asyncio.sleep(0)
        self.read.set()
        if self.open_end:
            await asyncio.Event().wait()
        if self.then is not None:
            raise self.then

    def cancel(self) -> None:
        """As Ray's."""
        self.cancelled.set()


async def read(stream: Stream) -> tuple[list[int], Exception | None]:
    """All items of a stream, and how it ended."""
    taken: list[int] = []
    ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    reader = StreamReader()
    reader.read(lambda: stream, taken.append, ended.set_result)
    async with asyncio.timeout(10):
        error = await ended
    reader.close()
    return taken, error


async def test_items_come_in_order_then_the_end() -> None:
    """Whether the stream ends or breaks, what came before is taken first."""
    assert await read(Stream(1000)) == (list(range(1000)), None)
    broken = ConnectionError("gone")
    assert await read(Stream(1000, broken)) == (list(range(1000)), broken)


async def test_a_stream_that_ray_cancels_has_ended() -> None:
    """What it raises looks like the reader's own cancel, but nobody has cancelled the reader."""
    taken, error = await read(Stream(10, asyncio.CancelledError()))
    assert taken == list(range(10))
    assert isinstance(error, ConnectionError)


async def test_a_stream_that_can_not_be_opened_ends_at_once() -> None:
    """Whoever waits for its items is told, as when it breaks later."""
    refused = ConnectionError("no such deployment")
    ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    reader = StreamReader()

    def fail() -> Stream:
        raise refused

    reader.read(fail, lambda item: None, ended.set_result)
    async with asyncio.timeout(10):
        assert await ended is refused
    reader.close()


async def test_a_stream_goes_on_in_another_one() -> None:
    """It is opened before the first has ended, and read after it; an end or a fault of either is one of the whole."""
    broken, taken, opened = ConnectionError("gone"), list[int](), list[Chained]()
    ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    reader = StreamReader()

    def open_next() -> Chained:
        opened.append(Chained(opened, follows=len(opened) < 2, then=broken))
        return opened[-1]

    reader.read(open_next, taken.append, ended.set_result)
    async with asyncio.timeout(10):
        assert await ended is broken
    reader.close()
    assert taken == [10, 11, 20, 21, 30]


class Chained:
    """Says that it goes on in another stream, has one more item, and ends once the other one is opened."""

    def __init__(self, opened: list[Chained], *, follows: bool, then: Exception) -> None:
        self.opened, self.follows, self.then, self.number = opened, follows, then, 10 * (len(opened) + 1)

    async def __aiter__(self) -> AsyncIterator[int | None]:
        """As a worker's outputs."""
        yield self.number
        if not self.follows:
            raise self.then
        yield None
        while len(self.opened) < self.number // 10 + 1:
            await asyncio.sleep(0)
        yield self.number + 1

    def cancel(self) -> None:
        """As Ray's."""


async def test_what_came_while_the_loop_was_busy_comes_at_once() -> None:
    """Nothing else runs between the items that had to wait."""
    stream, reader, turns = Stream(500, open_end=True), StreamReader(), 0
    at: list[int] = []

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    reading = reader.read(lambda: stream, lambda item: at.append(turns), lambda error: None)
    assert stream.read.wait(10)  # the loop stands still meanwhile
    while len(at) < 500:
        await asyncio.sleep(0)
    assert len(set(at)) == 1
    reading.cancel()
    counting.cancel()
    reader.close()


async def test_given_up_streams_are_cancelled_and_the_thread_ends() -> None:
    """By the one who reads it, or with the reader."""
    one, two, reader = Stream(1, open_end=True), Stream(1, open_end=True), StreamReader()
    given_up = reader.read(lambda: one, lambda item: None, lambda error: None)
    reader.read(lambda: two, lambda item: None, lambda error: None)
    assert await asyncio.to_thread(one.read.wait, 10) and await asyncio.to_thread(two.read.wait, 10)
    given_up.cancel()
    assert await asyncio.to_thread(one.cancelled.wait, 10) and not two.cancelled.is_set()
    reader.close()
    assert await asyncio.to_thread(two.cancelled.wait, 10)
    deadline = time.monotonic() + 10
    while any(thread.name == "baton-streams" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
