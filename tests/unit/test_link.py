"""A command that may not have reached its worker is handed back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.engine import EngineFacts
from runtime.link import Link
from runtime.stream_reader import StreamReader

FACTS = EngineFacts("e", "decode", "m", "auto", "auto", 16, 1, 8192, 100, "127.0.0.1", 1)


class Stream:
    """An output stream that stays open."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    async def __aiter__(self) -> AsyncIterator[list[Any]]:
        """A hello, and then nothing."""
        yield self._batches
        await asyncio.Event().wait()

    def cancel(self) -> None:
        """Ray's way to give up a stream."""


class Handle:
    """A worker that takes commands until it gets stuck."""

    def __init__(self, batches: list[Any] | None = None) -> None:
        self.taken: list[Any] = []
        self.stuck = asyncio.Event()
        self.sticks = False
        self.outputs = SimpleNamespace(remote=lambda *args: Stream(batches or []))
        self.exchange = SimpleNamespace(remote=self._exchange)

    def options(self, *, stream: bool) -> Handle:
        """As Ray Serve's."""
        return self

    async def _exchange(self, *args: Any) -> None:
        if self.sticks:
            self.stuck.set()
            await asyncio.Event().wait()
        self.taken += args[3]


def link_to(handle: Handle, reader: StreamReader, lost: list[str]) -> Link:
    """A link that takes no notice of what comes, and notes in `lost` why it was lost."""
    quiet: Any = lambda *_: None  # noqa: E731
    tell: Any = lambda link, why: lost.append(why)  # noqa: E731
    return Link(handle, FACTS, "f", "the token", quiet, quiet, tell, reader)  # type: ignore[arg-type]


async def until(condition: Any) -> None:
    """Wait for something that happens soon."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_lost_link_sends_no_more() -> None:
    """What is under way may have arrived; what waits and what comes later is dropped, and the loss is told once."""
    handle, lost, reader = Handle(), list[str](), StreamReader()
    link = link_to(handle, reader, lost)
    link.send(["taken"])
    await until(lambda: handle.taken)
    handle.sticks = True
    link.send(["under way"])
    await handle.stuck.wait()
    link.send(["waits"])
    link.close("enough")
    link.send(["late"])
    link.close()
    reader.close()
    await asyncio.sleep(0)
    assert handle.taken == [["taken"]]
    assert lost == ["enough"]


@pytest.mark.parametrize("steps", range(5))
async def test_a_link_that_is_lost_as_a_command_comes_sends_no_more(steps: int) -> None:
    """However far the writer has got with the command, so many steps of the loop after it."""
    handle, reader = Handle(), StreamReader()
    link = link_to(handle, reader, [])
    link.send(["taken"])
    await until(lambda: handle.taken)
    await asyncio.sleep(0.01)  # the writer waits for the next one
    link.send(["comes"])
    for _ in range(steps):
        await asyncio.sleep(0)
    taken = list(handle.taken)
    link.close("enough")
    reader.close()
    await asyncio.sleep(0.01)
    assert handle.taken == taken


async def test_a_call_that_ray_cancels_loses_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have brought its commands or not, as any call that failed."""
    handle, lost, reader = Handle(), list[str](), StreamReader()

    async def cancelled(*args: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(handle.exchange, "remote", cancelled)
    link = link_to(handle, reader, lost)
    link.send(["comes"])
    await until(lambda: lost)
    reader.close()
    assert lost == ["it took no commands: Ray cancelled the call"]


async def test_outputs_that_can_not_be_taken_lose_the_link() -> None:
    """A fault of ours must not leave streams waiting for tokens that came and went."""
    lost: list[str] = []
    reader = StreamReader()

    def fail(batch: Any) -> None:
        raise KeyError("a fault")

    link = Link(
        Handle(batches=["outputs"]),  # type: ignore[arg-type]
        FACTS,
        "f",
        "the token",
        fail,
        lambda link, news: None,
        lambda link, why: lost.append(why),
        reader,
    )
    await until(lambda: lost)
    reader.close()
    assert link.lost == "its output stream broke: KeyError"
    assert lost == [link.lost]
