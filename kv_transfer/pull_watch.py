"""Pulls of KV blocks that hang: neither done nor failed. A transfer has no timeout of its own.

An engine says how many pulls are in progress, not which; it starts them in the order in which the legs came. So the
oldest legs without a token are those that pull, and the others wait for blocks or for their turn.
"""

from __future__ import annotations


class PullWatch:
    """The legs of one decode worker that have a handoff and no token yet.

    Args:
        timeout_s: a pull that takes longer hangs.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._pulling_since: dict[str, float | None] = {}  # by leg id, in the order in which they came

    def came(self, leg_id: str) -> None:
        """A leg with a handoff goes to the engine."""
        self._pulling_since[leg_id] = None

    def over(self, leg_id: str) -> None:
        """The leg has its blocks, failed, or was aborted."""
        self._pulling_since.pop(leg_id, None)

    def look(self, in_progress: int, now: float) -> list[str]:
        """The legs whose pull hangs, when so many pulls are in progress; they are watched no longer."""
        hung = []
        for place, (leg_id, since) in enumerate(self._pulling_since.items()):
            if place >= in_progress:
                self._pulling_since[leg_id] = None
            elif since is None:
                self._pulling_since[leg_id] = now
            elif now - since > self._timeout_s:
                hung.append(leg_id)
        for leg_id in hung:
            self.over(leg_id)
        return hung
