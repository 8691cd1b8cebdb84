"""What stands in for Ray Serve's handles: calls and streams to workers in this process, slow and unreliable ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.chaos.fabric import Fabric, Worker

END = object()


class Died(Exception):
    """What a call to a killed worker ends with."""


class Call:
    """A method of a handle: `handle.method.remote(engine_id, …)`."""

    def __init__(self, handle: Handle, method: str) -> None:
        self._handle, self._method = handle, method

    def remote(self, engine_id: str | None, *args: Any) -> Any:
        """Start the call."""
        if self._handle.stream:
            return Stream(self._handle, self._method, engine_id, args)
        return self._call(engine_id, *args)

    async def _call(self, engine_id: str | None, *args: Any) -> Any:
        if len(args) > 1 and self._handle.fabric.is_silent(str(args[1])):
            raise Died("the caller is dead")
        worker = await self._handle.reach(engine_id)
        if self._method == "exchange" and self._handle.deployment_name == self._handle.fabric.swallows:
            await asyncio.Event().wait()
        work = asyncio.ensure_future(getattr(worker, self._method)(engine_id, *args))
        death = asyncio.ensure_future(worker.killed.wait())
        await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        if worker.killed.is_set():
            work.cancel()
            raise Died(self._method)
        return await work


class Stream:
    """A streaming call, under way once it is made. Read in another loop than the one that the workers live in."""

    def __init__(self, handle: Handle, method: str, engine_id: str | None, args: tuple[Any, ...]) -> None:
        self._home = handle.fabric.loop
        self._handle, self._method, self._engine_id, self._args = handle, method, engine_id, args
        self._task: asyncio.Task[None] | None = None
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        loop, put = asyncio.get_running_loop(), self._items.put_nowait
        self._home.call_soon_threadsafe(self._begin, lambda item: loop.call_soon_threadsafe(put, item))

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Items until the stream ends or the worker dies."""
        while True:
            kind, value = await self._items.get()
            if kind == "item":
                yield value
            elif kind == "end":
                return
            else:
                raise value

    def _begin(self, put: Callable[[Any], object]) -> None:
        self._task = asyncio.ensure_future(self._pump(put))

    async def _pump(self, put: Callable[[Any], object]) -> None:
        with suppress(RuntimeError):  # the reader's loop is closed
            try:
                worker = await self._handle.reach(self._engine_id)
                async for item in self._until_death(worker):
                    put(("item", item))
                put(("end", None))
            except Died as error:
                put(("error", error))

    async def _until_death(self, worker: Worker) -> AsyncIterator[Any]:
        death = asyncio.ensure_future(worker.killed.wait())
        generator = getattr(worker, self._method)(self._engine_id, *self._args)
        step: asyncio.Future[Any] = asyncio.ensure_future(asyncio.sleep(0))
        try:
            while True:
                step = asyncio.ensure_future(anext(generator, END))
                await asyncio.wait({step, death}, return_when=asyncio.FIRST_COMPLETED)
                if worker.killed.is_set():
                    step.cancel()
                    raise Died(self._method)
                await self._handle.fabric.delay()
                if (item := step.result()) is END:
                    return
                yield item
        except asyncio.CancelledError:
            step.cancel()
            await asyncio.wait({step})
            await generator.aclose()
            raise
        finally:
            death.cancel()

    def cancel(self) -> None:
        """Ray's way to give up a stream: the worker's generator is closed."""
        self._home.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        if self._task is not None and not self._handle.fabric.is_silent(self._args[1]):
            self._task.cancel()


class Handle:
    """A deployment handle."""

    def __init__(self, fabric: Fabric, role: str, stream: bool = False) -> None:
        self.fabric, self.deployment_name, self.stream = fabric, role, stream

    def options(self, *, stream: bool) -> Handle:
        """As Ray Serve's."""
        return Handle(self.fabric, self.deployment_name, stream)

    def __getattr__(self, method: str) -> Call:
        return Call(self, method)

    async def reach(self, engine_id: str | None) -> Worker:
        """The worker that a call is for, after a while; a message may get lost, which breaks the call."""
        await self.fabric.delay()
        if self.fabric.loses_message():
            raise Died("the message was lost")
        for worker in self.fabric.pools[self.deployment_name]:
            if engine_id in (None, worker.engine.facts.engine_id):
                return worker
        raise Died("no such engine")
