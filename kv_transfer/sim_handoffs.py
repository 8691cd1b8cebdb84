"""Handoffs of a simulated engine: the blocks that it pins for others to pull, and those that it pulls itself.

Which requests run is the engine's to know; what goes over the wire is in `sim_transfer.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from kv_transfer.settings import SimulatorSettings
from kv_transfer.sim_faults import Faults
from kv_transfer.sim_request import SimRequest
from kv_transfer.sim_transfer import RELEASE_TIMEOUT_S, TransferServer, settle_remote


class SimHandoffs:
    """Both ends of one engine's handoffs, and counts of what came of them.

    Args:
        engine_id: of the engine, which whoever pulls has to name.
        lease_s: how long blocks stay pinned when nobody pulls or releases them.
        speed: of transfers, among other things.
        faults: pulls that are to fail or hang.
        free: called with each request whose blocks nobody will pull any more.
    """

    def __init__(
        self,
        engine_id: str,
        lease_s: float,
        speed: SimulatorSettings,
        faults: Faults,
        free: Callable[[SimRequest], None],
    ) -> None:
        self.leases_expired = self.pulls = self.pulled_bytes = 0
        self._engine_id = engine_id
        self._lease_s = lease_s
        self._speed = speed
        self._faults = faults
        self._free = free
        self._host, self._port = "", 0
        self._pinned: dict[str, tuple[SimRequest, asyncio.TimerHandle]] = {}
        self._server = TransferServer(engine_id, self.settle)

    def __len__(self) -> int:
        """How many finished prefills have their blocks pinned."""
        return len(self._pinned)

    async def start(self, host: str) -> int:
        """Listen for pulls on a free port of `host` and return it."""
        self._host, self._port = host, await self._server.start(host)
        return self._port

    def close(self) -> None:
        """Stop listening, and all leases."""
        self._server.close()
        for _, lease in self._pinned.values():
            lease.cancel()

    # The prefill side

    def pin(self, entry: SimRequest) -> dict[str, Any]:
        """Pin the blocks of a finished prefill until they are pulled, released, or the lease ends.

        Returns:
            the KV transfer parameters that lead here.
        """
        timer = asyncio.get_running_loop().call_later(self._lease_s, self._expire, entry.id)
        self._pinned[entry.id] = (entry, timer)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(len(entry.held)))],
            "remote_engine_id": self._engine_id,
            "remote_request_id": entry.id,
            "remote_host": self._host,
            "remote_port": self._port,
            "tp_size": 1,
            "remote_num_tokens": len(entry.prompt),
            "remote_blocks_expiry_time": time.time() + self._lease_s,
            "remote_prefill_cached_tokens": entry.cached,
        }

    def settle(self, request_id: str) -> int | None:
        """Free the blocks of a finished prefill; tokens that they hold, or None when there are none."""
        found = self._pinned.pop(request_id, None)
        if found is None or self._faults.dead:
            return None
        entry, lease = found
        lease.cancel()
        self._free(entry)
        return len(entry.prompt)

    def settle_own(self, params: dict[str, Any]) -> None:
        """Release the handoff that KV transfer parameters lead to, if it is one of this engine's."""
        if params.get("remote_engine_id") == self._engine_id:
            self.settle(str(params["remote_request_id"]))

    def _expire(self, request_id: str) -> None:
        if self.settle(request_id) is not None:
            self.leases_expired += 1

    # The decode side

    async def pull(self, entry: SimRequest) -> bool:
        """Fetch the blocks that are not here; all but the last prompt token, whose logits nobody else has.

        Returns:
            whether they came: `entry.pulled` tokens.
        """
        tokens = max(0, len(entry.prompt) - 1 - entry.cached)
        size = tokens * self._speed.kv_bytes_per_token
        if not self._speed.zero_time:
            await asyncio.sleep(size / self._speed.transfer_bytes_per_s * self._faults.slow)
        if self._faults.hang_pulls > 0:
            self._faults.hang_pulls -= 1
            await asyncio.Event().wait()
        failed = self._faults.fail_pulls > 0
        self._faults.fail_pulls -= failed
        if failed or not await settle_remote(entry.params):
            return False
        self.pulls += 1
        self.pulled_bytes += size
        entry.pulled = tokens
        return True

    async def decline(self, entry: SimRequest) -> None:
        """Tell the prefill engine of an aborted request that nobody will pull its blocks."""
        await settle_remote(entry.params, RELEASE_TIMEOUT_S)
