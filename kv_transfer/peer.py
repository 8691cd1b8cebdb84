"""A front end as a worker knows it, and why a worker turns a caller away."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kv_transfer.load import News

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs


class WrongIncarnation(Exception):
    """The caller meant another engine, most likely one that stood here before."""

    def __init__(self, wanted: str, here: str) -> None:
        super().__init__(wanted, here)
        self.wanted, self.here = wanted, here

    def __str__(self) -> str:
        return f"engine {self.wanted} is not here, {self.here} is"


class WrongApplication(Exception):
    """The caller does not belong to this worker's application."""

    def __str__(self) -> str:
        return "the call comes from another application, model or revision"


class NoStream(Exception):
    """A front end sent work without a stream to take the outputs."""

    def __init__(self, front_end: str) -> None:
        super().__init__(front_end)

    def __str__(self) -> str:
        return f"front end {self.args[0]} has no output stream here"


@dataclass
class Peer:
    """What a worker keeps of one front end: its stream's queue, its legs, and the blocks that wait to be pulled."""

    queue: asyncio.Queue[EngineCoreOutputs | News | None] = field(default_factory=asyncio.Queue)
    legs: set[str] = field(default_factory=set)
    handoffs: dict[str, dict[str, Any]] = field(default_factory=dict)  # KV transfer parameters by leg id
    heard: float = field(default_factory=time.monotonic)
    came: int = 0  # legs that this front end has sent
    told: News | None = None
    _next_stream: asyncio.Future[bool] | None = None  # what an output stream that is long enough waits for

    async def batch(self) -> list[EngineCoreOutputs | News]:
        """All that is in the queue, at least one; nothing when the stream is to end."""
        batch: list[EngineCoreOutputs | News] = []
        while not batch or not self.queue.empty():
            item = await self.queue.get()
            if item is None:
                self.queue.put_nowait(None)  # after this batch, or at once: the next call finds it and ends
                return batch
            batch.append(item)
        return batch

    def end(self) -> None:
        """Have the stream end, after what is in the queue."""
        self.queue.put_nowait(None)
        if self._next_stream is not None and not self._next_stream.done():
            self._next_stream.set_result(False)

    def next_stream(self) -> asyncio.Future[bool]:
        """Expect the front end to open its next stream: done once it has, False when this one is to end first."""
        self._next_stream = asyncio.get_running_loop().create_future()
        return self._next_stream

    def take_over(self) -> bool:
        """Whether another stream waits for this one to go on in its place."""
        if self._next_stream is None or self._next_stream.done():
            return False
        self._next_stream.set_result(True)
        return True
