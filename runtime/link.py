"""The link from one front end to one worker: legs and aborts out, step outputs in, and the worker's death noticed."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kv_transfer.engine import EngineFacts
from kv_transfer.load import News
from kv_transfer.peers import FRONT_END_SILENCE_S
from runtime.stream_reader import StreamReader, told_to_stop

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

    from kv_transfer.worker import Command

logger = logging.getLogger("baton.link")

HEARTBEAT_S = FRONT_END_SILENCE_S / 4

EXCHANGE_MEMORY = 16.0
"""A message's time counts 1/e after so many others; one that took very long counts as not quite so long."""


class Link:
    """A task sends what is queued as one handle call at a time (so order holds and bursts batch by themselves), and
    `reader` reads the worker's output stream. When either fails the link is lost, once and for good.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        facts: EngineFacts,
        front_end: str,
        token: str,
        on_outputs: Callable[[EngineCoreOutputs], None],
        on_news: Callable[[Link, News], None],
        on_lost: Callable[[Link, str], None],
        reader: StreamReader,
    ) -> None:
        self.facts = facts
        self.exchange_s: float | None = None  # the usual time of a message there and back
        self.up = asyncio.Event()
        self.lost: str | None = None
        self._handle = handle
        self._token = token
        # A link that was lost and made anew is another one to the worker, which answers nothing that comes late.
        self._name = f"{front_end}-{uuid.uuid4().hex[:8]}"
        self._on_outputs = on_outputs
        self._on_news = on_news
        self._on_lost = on_lost
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._settled: list[str] = []
        self._expected: dict[str, int] = {}
        self._legs = 0
        # Handle calls from one Serve request share an id and can be mistaken for each other: belong to none.
        self._writing = asyncio.get_running_loop().create_task(self._write(), context=contextvars.Context())
        self._reading = reader.read(self._open, self._take, self._ended)

    def send(self, command: Command) -> None:
        """Queue a leg, or the ids of legs to abort; never blocks. It is dropped when the link is lost."""
        if self.lost is None:
            self._commands.put_nowait(command)

    def submit(self, request: EngineCoreRequest, expected: int) -> int:
        """Queue a leg, as `send` does, with the number of prompt tokens that are to be read or fetched.

        Returns:
            the leg's number on this link, as `News.legs` counts.
        """
        self._expected[request.request_id] = expected
        self._legs += 1
        self.send(request)
        return self._legs

    def settled(self, leg_id: str) -> None:
        """Tell the worker, with whatever is sent next, that a leg's handoff was pulled or released."""
        self._settled.append(leg_id)

    async def call(self, method: str, *args: Any) -> Any:
        """Call a utility method of the worker's engine core."""
        return await self._handle.call.remote(self.facts.engine_id, self._token, method, list(args))

    def close(self, why: str = "closed") -> None:
        """Lose the link on purpose; the worker aborts this front end's legs."""
        self._lose(why)

    def _open(self) -> Any:
        return self._handle.options(stream=True).outputs.remote(self.facts.engine_id, self._token, self._name)

    def _take(self, batches: list[EngineCoreOutputs | News]) -> None:
        if self.lost is not None:
            return
        self.up.set()
        try:
            for batch in batches:
                if isinstance(batch, News):
                    self._on_news(self, batch)
                else:
                    self._on_outputs(batch)
        except Exception as error:  # tokens are lost: only a new link and the continuations make up for them
            logger.exception("what worker %s sent could not be taken", self.facts.engine_id)
            self._ended(error)

    def _ended(self, error: Exception | None) -> None:
        # Any failure of the stream means the same: this worker is dead to us.
        self._lose("its output stream ended" if error is None else f"its output stream broke: {type(error).__name__}")

    async def _write(self) -> None:
        await self.up.wait()
        try:
            while True:
                commands = await self._next_commands()
                while not self._commands.empty():
                    commands.append(self._commands.get_nowait())
                settled, self._settled = self._settled, []
                expected, self._expected = self._expected, {}
                sent = time.monotonic()
                await self._handle.exchange.remote(
                    self.facts.engine_id, self._token, self._name, commands, settled, expected
                )
                self._exchanged(time.monotonic() - sent)
        except asyncio.CancelledError:
            if told_to_stop():
                raise
            self._lose("it took no commands: Ray cancelled the call")
        except Exception as error:  # as above
            self._lose(f"it took no commands: {type(error).__name__}: {error}")

    async def _next_commands(self) -> list[Command]:
        """The next command; none after a while, which tells the worker that this front end is alive."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):  # `wait_for` swallows a cancel that comes as a command does
                return [await self._commands.get()]
        except TimeoutError:
            return []

    def _exchanged(self, seconds: float) -> None:
        before = seconds if self.exchange_s is None else self.exchange_s
        self.exchange_s = before + (min(seconds, 4 * before) - before) / EXCHANGE_MEMORY

    def _lose(self, why: str) -> None:
        if self.lost is not None:
            return
        self.lost = why
        self.up.set()  # whoever waits for it looks at `lost` next
        self._reading.cancel()
        if self._writing is not asyncio.current_task():
            self._writing.cancel()
        self._on_lost(self, why)
