"""Handoffs that are outstanding: the prefill has finished, its blocks are neither pulled nor released yet.

Each entry is a debt to a prefill engine, whose blocks stay pinned until it is paid. The lease that the engine gave is
the last resort; nothing here counts on it.
"""

from __future__ import annotations

import asyncio
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
# A counter that begins with its first event hides it from `increase`: they are all there from the start.
for _reason in ("lost", "abandoned"):
    RELEASED.labels(reason=_reason)
for _end in ("pulled", "released", "entrusted", "died"):
    SETTLED_SECONDS.labels(end=_end)


ABORT_S = 60.0
"""After so long a decode engine has carried out an abort, or counts as dead. (A step on a CPU can take 10 s.)"""


class Ledger:
    """The outstanding handoffs of one front end.

    Args:
        send: has a prefill engine release a handoff.
        on_settled: called with each handoff once nobody will pull its blocks any more: they were pulled or released, or
            their engine died.
    """

    def __init__(self, send: Callable[[Handoff], None], on_settled: Callable[[Handoff], None]) -> None:
        self._send = send
        self._on_settled = on_settled
        self._since: dict[Handoff, float] = {}
        self._entrusted: dict[Handoff, str] = {}  # to which decode engine

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

    def entrust(self, handoff: Handoff, engine_id: str) -> None:
        """A decode engine was told to pull the blocks, and now to abort: it settles them, pulled or not, if it lives.

        It does not tell when. To release the blocks at once could change them under a pull that is under way. So they
        count as settled after `ABORT_S`, and the prefill engine has to stay until then (`unsettled`).
        """
        if self._end(handoff, "entrusted"):
            self._entrusted[handoff] = engine_id
            asyncio.get_running_loop().call_later(ABORT_S, self._carried_out, handoff)

    def forget(self, engine_id: str) -> None:
        """An engine has died: a prefill engine's blocks with it; what a decode engine was to settle is released."""
        for handoff in [handoff for handoff in self._since if handoff.engine_id == engine_id]:
            self._close(handoff, "died")
        for handoff in [handoff for handoff in self._entrusted if handoff.engine_id == engine_id]:
            self._carried_out(handoff)
        for handoff in [handoff for handoff, decode in self._entrusted.items() if decode == engine_id]:
            del self._entrusted[handoff]
            self.open(handoff)
            self.release(handoff, "lost")

    def outstanding(self) -> Count[str]:
        """How many handoffs of each prefill engine are outstanding."""
        return Count(handoff.engine_id for handoff in self._since)

    def unsettled(self) -> Count[str]:
        """How many handoffs of each prefill engine somebody may still pull: outstanding ones and entrusted ones."""
        return self.outstanding() + Count(handoff.engine_id for handoff in self._entrusted)

    def pinned_blocks(self) -> Count[str]:
        """How many KV blocks of each prefill engine wait to be pulled or released."""
        blocks: Count[str] = Count()
        for handoff in self._since:
            blocks[handoff.engine_id] += handoff.blocks
        return blocks

    def oldest_s(self) -> float:
        """Age of the oldest outstanding handoff, in seconds; 0 when there is none."""
        return time.monotonic() - min(self._since.values()) if self._since else 0.0

    def _carried_out(self, handoff: Handoff) -> None:
        """A decode engine has had its time to settle what was entrusted to it."""
        if self._entrusted.pop(handoff, None) is not None:
            self._on_settled(handoff)

    def _close(self, handoff: Handoff, end: str) -> None:
        if self._end(handoff, end):
            self._on_settled(handoff)

    def _end(self, handoff: Handoff, end: str) -> bool:
        """Whether the handoff was outstanding; it is no more."""
        since = self._since.pop(handoff, None)
        if since is None:
            return False
        OUTSTANDING.dec()
        SETTLED_SECONDS.labels(end=end).observe(time.monotonic() - since)
        return True
