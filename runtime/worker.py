"""A worker as a front end knows it: the link to it, where it is in its life, and this front end's work on it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum

from runtime.account import Account
from runtime.link import Link

FAILURES_IN_A_ROW = 3
"""So many requests that failed on a worker, with none between that worked, and it is set aside. One request that fails
wherever it goes counts once."""


class State(Enum):
    """Where a worker is in its life, to one front end."""

    CONNECTING = "connecting"
    WARMING = "warming"
    READY = "ready"
    REFUSED = "refused"
    DRAINING = "draining"


_PHASE_ENDS = {State.WARMING: "connect", State.READY: "warm"}
"""Phases of a worker's start that end with a change of its state to a front end."""


@dataclass(eq=False)
class Worker:
    """One worker of the fleet."""

    link: Link
    state: State = State.CONNECTING
    since: float = field(default_factory=time.monotonic)  # of its state
    start_s: dict[str, float] = field(default_factory=dict)  # seconds of the phases that this front end sees
    account: Account = field(init=False)
    linked: float = field(default_factory=time.monotonic)
    _failures: set[str] = field(default_factory=set)  # requests that failed, with none between that worked
    _out_of_time: asyncio.TimerHandle | None = None  # set while it drains

    def __post_init__(self) -> None:
        self.account = Account(self.link.facts)

    def enter(self, state: State) -> None:
        """Go on to `state`."""
        now = time.monotonic()
        if state in _PHASE_ENDS:
            self.start_s.setdefault(_PHASE_ENDS[state], now - self.since)
        self.state, self.since = state, now

    def failed(self, request_id: str) -> bool:
        """Note a request that failed on it; whether these are so many now that it is to be set aside."""
        self._failures.add(request_id)
        if len(self._failures) < FAILURES_IN_A_ROW or self.state is not State.READY:
            return False
        self._failures.clear()
        return True

    def worked(self) -> None:
        """Note a leg that worked."""
        self._failures.clear()

    def start_drain_timer(self, drain_s: float) -> None:
        """Lose the link after so many seconds, unless `stop_drain_timer` comes first."""
        loop = asyncio.get_running_loop()
        self._out_of_time = loop.call_later(drain_s, self.link.close, "its time to drain is over")

    def stop_drain_timer(self) -> None:
        """Its drain is over, or need not be."""
        if self._out_of_time is not None:
            self._out_of_time.cancel()
