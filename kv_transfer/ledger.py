"""Handoffs that are outstanding: the prefill has finished, its blocks are neither pulled nor released yet.

Each entry is a debt to a prefill engine, whose blocks stay pinned until it is paid. The lease that the engine gave is
the last resort; nothing here counts on it.
"""

from __future__ import annotations

import time
from collections import Counter as Count
from collections import deque
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
        on_settled: called with each handoff that was pulled or released, or whose engine died.
    """

    def __init__(self, send: Callable[[Handoff], None], on_settled: Callable[[Handoff], None]) -> None:
        self._send = send
        self._on_settled = on_settled
        self._since: dict[Handoff, float] = {}
        self._entrusted: deque[tuple[float, str, Handoff]] = deque()  # since when, to which decode engine

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

        It does not tell when. To release the blocks at once could change them under a pull that is under way.
        """
        now = time.monotonic()
        while self._entrusted and now - self._entrusted[0][0] > ABORT_S:
            self._entrusted.popleft()
        self._entrusted.append((now, engine_id, handoff))
        self._close(handoff, "entrusted")

    def forget(self, engine_id: str) -> None:
        """An engine has died: a prefill engine's blocks with it; what a decode engine was to settle is released."""
        for handoff in [handoff for handoff in self._since if handoff.engine_id == engine_id]:
            self._close(handoff, "died")
        lost = [handoff for _, decode, handoff in self._entrusted if decode == engine_id]
        kept = (entry for entry in self._entrusted if engine_id not in (entry[1], entry[2].engine_id))
        self._entrusted = deque(kept)
        for handoff in lost:
            self.open(handoff)
            self.release(handoff, "lost")

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
