"""The front ends of one worker: whose each leg is, what is on its way to each of them, and which are silent."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from kv_transfer.load import Load, News
from kv_transfer.peer import Peer

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

logger = logging.getLogger("baton.worker")


FRONT_END_SILENCE_S = 10.0
"""A front end that has sent nothing for this long is dead: Ray does not end the streams of a caller that died.

Workers hear of a front end at most a heartbeat apart and look for silence once a heartbeat, which is a quarter of this;
so all notice its death within half of this."""


class Peers:
    """All front ends with an output stream here. A name is that of a front end's link."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}  # leg id -> name of its front end
        self._by_name: dict[str, Peer] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._by_name)

    def get(self, name: str) -> Peer | None:
        """A front end; None when it has no stream here."""
        return self._by_name.get(name)

    def join(self, name: str) -> Peer:
        """A front end opens its first stream."""
        peer = self._by_name[name] = Peer()
        return peer

    def leave(self, name: str, peer: Peer) -> None:
        """A front end's stream has ended; another one of the same name stays."""
        if self._by_name.get(name) is peer:
            del self._by_name[name]

    def took(self, leg_id: str, name: str, peer: Peer) -> None:
        """A leg of a front end goes to the engine."""
        self.owners[leg_id] = name
        peer.legs.add(leg_id)
        peer.came += 1

    def over(self, leg_id: str) -> None:
        """A leg has ended or was aborted."""
        if (peer := self.owner(leg_id)) is not None:
            peer.legs.discard(leg_id)
        self.owners.pop(leg_id, None)

    def owner(self, leg_id: str) -> Peer | None:
        """The front end of a leg; None when the leg is over or the front end is gone."""
        name = self.owners.get(leg_id)
        return None if name is None else self._by_name.get(name)

    def handoffs(self) -> list[dict[str, Any]]:
        """KV transfer parameters of all handoffs that no front end has settled."""
        return [params for peer in self._by_name.values() for params in peer.handoffs.values()]

    def hand_out(self, outputs: EngineCoreOutputs) -> list[dict[str, Any]]:
        """Split a step's outputs by front end, and queue for each what is its own.

        Returns:
            KV transfer parameters of finished legs that are nobody's: they were aborted after they had finished, so
            nobody will ask for their blocks.
        """
        split: dict[str, list[EngineCoreOutput]] = {}
        nobodys = []
        for output in outputs.outputs:
            name = self.owners.get(output.request_id)
            if name is None:
                if output.kv_transfer_params:
                    nobodys.append(output.kv_transfer_params)
                continue
            split.setdefault(name, []).append(output)
            if output.finished:
                self.over(output.request_id)
                if output.kv_transfer_params and name in self._by_name:
                    self._by_name[name].handoffs[output.request_id] = output.kv_transfer_params
        for name, batch in split.items():
            if (peer := self._by_name.get(name)) is not None:
                peer.queue.put_nowait(type(outputs)(outputs=batch, timestamp=outputs.timestamp))
        return nobodys

    def tell(self, load: Load) -> None:
        """Tell those of the worker's load to whom it is news."""
        for peer in self._by_name.values():
            news = News(load, peer.came)
            if news != peer.told:
                peer.told = news
                peer.queue.put_nowait(news)

    def end(self) -> None:
        """Have all streams end."""
        for peer in self._by_name.values():
            peer.end()

    async def drop_silent(self) -> None:
        """End the streams of front ends that died, which aborts their legs; does so for as long as it runs."""
        period = FRONT_END_SILENCE_S / 4
        while True:
            slept = time.monotonic()
            await asyncio.sleep(period)
            now = time.monotonic()
            for name, peer in self._by_name.items():
                if now - slept > 2 * period:
                    peer.heard = now  # it was this process that stood still
                elif now - peer.heard > FRONT_END_SILENCE_S:
                    logger.warning("front end %s is silent: its %d legs are aborted", name, len(peer.legs))
                    peer.end()


async def everybody_has_noticed() -> None:
    """Wait until each worker has noticed that a front end is gone."""
    await asyncio.sleep(FRONT_END_SILENCE_S / 2)
