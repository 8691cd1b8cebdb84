"""Whether an engine core gets on: no step that does not come, no pull that hangs, no lease that ran out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from kv_transfer.engine import Engine
from kv_transfer.pull_watch import PullWatch

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs

logger = logging.getLogger("baton.worker")

CHECKS = 10
"""How often in `hang_s` an engine that has work is looked at, and in `pull_timeout_s` its pulls."""


class EngineWatch:
    """Looks after one engine that has started, until it is dead.

    Args:
        hang_s: an engine that has had work all this time, and made no step with it, hangs.
        pull_timeout_s: a pull that takes longer hangs.
        has_work: whether the engine has any.
        on_hang: called with the reason when the engine counts as dead.
        give_up: called with each leg whose pull hangs.
    """

    def __init__(
        self,
        engine: Engine,
        hang_s: float,
        pull_timeout_s: float,
        has_work: Callable[[], bool],
        on_hang: Callable[[str], None],
        give_up: Callable[[str], Awaitable[None]],
    ) -> None:
        self.pulls = PullWatch(pull_timeout_s)
        self._engine = engine
        self._hang_s = hang_s
        self._pull_timeout_s = pull_timeout_s
        self._has_work = has_work
        self._on_hang = on_hang
        self._give_up = give_up
        self._stepped = time.monotonic()
        self._ended = False

    def stepped(self, outputs: EngineCoreOutputs, now: float) -> None:
        """The engine has made a step: legs with an output pull no longer."""
        self._stepped = now
        for output in outputs.outputs:
            self.pulls.over(output.request_id)

    def end(self) -> None:
        """The engine is dead: there is nothing to look after any more."""
        self._ended = True

    async def watch_steps(self) -> None:
        """Take an engine that hangs for dead."""
        period = self._hang_s / CHECKS
        while not self._ended:
            slept = time.monotonic()
            await asyncio.sleep(period)
            self._stepped += max(0.0, time.monotonic() - slept - 2 * period)  # this process stood still, not the engine
            if not self._has_work():
                self._stepped = time.monotonic()
            elif time.monotonic() - self._stepped > self._hang_s:
                self._on_hang(f"no step for {self._hang_s:g} s although it has work")

    async def watch_handoffs(self) -> None:
        """Give up pulls that hang, and tell of leases that ran out: each was a handoff that nobody settled."""
        expired = 0
        while not self._ended:
            await asyncio.sleep(self._pull_timeout_s / CHECKS)
            state = await self._engine.call("state")
            if (count := state.get("leases_expired", 0)) > expired:
                logger.warning("%d leases ran out", count - expired)
                expired = count
            for leg_id in self.pulls.look(state.get("fetching", 0), time.monotonic()):
                await self._give_up(leg_id)
