"""Reads the workers' output streams in a thread of its own, beside the event loop that writes to clients.

While that loop is busy, Ray goes on delivering. What came meanwhile is handed over in one call, so a front end that
falls behind catches up with fewer and larger pieces, as vLLM's own server does when its engine runs ahead.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

T = TypeVar("T")

Ended: TypeAlias = Callable[[Exception | None], object]


class Stream(Protocol):
    """What a streaming handle call returns."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    def cancel(self) -> None: ...


class StreamReader:
    """A thread with an event loop that does nothing but read. Made, used and closed in the loop that gets the items."""

    def __init__(self) -> None:
        self._home = asyncio.get_running_loop()
        self._loop = asyncio.new_event_loop()
        self._closed = False
        threading.Thread(target=self._run, name="baton-streams", daemon=True).start()

    def read(self, open_stream: Callable[[], Stream], take: Callable[[T], object], ended: Ended) -> Future[None]:
        """Open a stream and pass its items to `take`, in order, and how it ended to `ended`; cancel what comes back to
        give the stream up. An item of None means that the stream goes on in another one: that one is opened, and the
        first is read to its end before it.

        Handle calls from one Serve request share an id and can be mistaken for each other: these belong to none.
        """
        work = self._pump(open_stream, _Tray(self._home, take), ended)
        return contextvars.Context().run(asyncio.run_coroutine_threadsafe, work, self._loop)

    def close(self) -> None:
        """Give up what is still read, and end the thread. May be called again."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._loop.stop()

    async def _pump(self, open_stream: Callable[[], Stream], tray: _Tray[T], ended: Ended) -> None:
        streams: deque[Stream] = deque()
        why: Exception | None = None
        try:
            streams.append(open_stream())
            while streams:
                async for item in streams[0]:
                    if item is None:
                        streams.append(open_stream())
                    else:
                        tray.put(item)
                streams.popleft()
        except asyncio.CancelledError:
            if told_to_stop():
                raise
            why = ConnectionError("Ray cancelled the stream")
        except Exception as error:  # whatever it was, the reader's owner decides
            why = error
        finally:
            for stream in streams:
                stream.cancel()
        self._home.call_soon_threadsafe(ended, why)


def told_to_stop() -> bool:
    """Whether the running task was cancelled itself: Ray raises `CancelledError`, too, where a call of its own was."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Tray(Generic[T]):
    """Items on their way from the reading thread to the loop that takes them."""

    def __init__(self, home: asyncio.AbstractEventLoop, take: Callable[[T], object]) -> None:
        self._home = home
        self._take = take
        self._items: deque[T] = deque()
        self._called = False

    def put(self, item: T) -> None:
        """Called in the thread."""
        self._items.append(item)
        if not self._called:
            self._called = True
            self._home.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._called = False  # first, so that what comes from now on calls again
        while self._items:
            self._take(self._items.popleft())
