"""Handoffs that are outstanding: the prefill has finished, its blocks are neither pulled nor released yet.

Each entry is a debt to a prefill engine, whose blocks stay pinned until it is paid. The lease that the engine gave is
the last resort; nothing here counts on it.
"""

from __future__ import annotations

import time
from collections import Counter as Count
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from kv_transfer.handoff import Handoff

OUTSTANDING = Gauge("baton_handoffs_outstanding", "Finished prefills whose blocks are neither pulled nor released.")
RELEASED = Counter(
    "baton_handoffs_released_total", "Handoffs released because nobody would pull them, by reason.", ["reason"]
)
SETTLED_SECONDS = Histogram(
    "baton_handoff_seconds",
    "From the end of a prefill until its blocks were pulled or released.",
    ["end"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)


class Ledger:
    """The outstanding handoffs of one front end.

    Args:
        send: has a prefill engine release a handoff.
        on_settled: called with each handoff that was pulled or released, or whose engine died.
    """

    def __init__(self, send: Callable[[Handoff], None], on_settled: Callable[[Handoff], None]) -> None:
        self._send = send
        self._on_settled = on_settled
        self._since: dict[Handoff, float] = {}

    def open(self, handoff: Handoff) -> None:
        """A prefill has finished."""
        self._since[handoff] = time.monotonic()
        OUTSTANDING.inc()

    def pulled(self, handoff: Handoff) -> None:
        """A decode engine has the blocks."""
        self._close(handoff, "pulled")

    def release(self, handoff: Handoff, reason: str) -> None:
        """Nobody will pull the blocks: free them at once."""
        if handoff in self._since:
            self._send(handoff)
            RELEASED.labels(reason=reason).inc()
            self._close(handoff, "released")

    def forget(self, engine_id: str) -> None:
        """A prefill engine has died, and its blocks with it."""
        for handoff in [handoff for handoff in self._since if handoff.engine_id == engine_id]:
            self._close(handoff, "died")

    def outstanding(self) -> Count[str]:
        """How many handoffs of each prefill engine are outstanding."""
        return Count(handoff.engine_id for handoff in self._since)

    def pinned_blocks(self) -> Count[str]:
        """How many KV blocks of each prefill engine wait to be pulled or released."""
        blocks: Count[str] = Count()
        for handoff in self._since:
            blocks[handoff.engine_id] += handoff.blocks
        return blocks

    def oldest_s(self) -> float:
        """Age of the oldest outstanding handoff, in seconds; 0 when there is none."""
        return time.monotonic() - min(self._since.values()) if self._since else 0.0

    def _close(self, handoff: Handoff, end: str) -> None:
        since = self._since.pop(handoff, None)
        if since is not None:
            OUTSTANDING.dec()
            SETTLED_SECONDS.labels(end=end).observe(time.monotonic() - since)
            self._on_settled(handoff)
