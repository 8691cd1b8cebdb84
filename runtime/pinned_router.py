"""Ray Serve's router for the two pools: sends a call to the engine it names, and tells the fleet who is there.

A handle call's first argument is the engine id that it is meant for (`None`: any replica). Baton has chosen the worker
before it calls; Serve only carries the call. So this router overrides the choice itself, not one step of it: there is
no queue, no probing and no retry elsewhere, and two concurrent calls can't be mistaken for each other.

A replica that Serve takes away stays reachable until it has drained: it takes no new work, but aborts and signs of life
have to get through.

Serve pickles this module by value into every process: state that is shared with the rest lives in `engine_board`.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve._private.common import ReplicaQueueLengthInfo, RunningReplicaInfo
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import RequestRouter

from runtime import engine_board

ROUTER_CLASS = "runtime.pinned_router.PinnedRouter"


class EngineGone(Exception):
    """No replica announces this engine any more."""

    def __init__(self, engine_id: str) -> None:
        super().__init__(engine_id)

    def __str__(self) -> str:
        return f"no replica has engine {self.args[0]}"


class WillingReplica(RunningReplica):
    """A replica that is not asked whether it has room for a call.

    Serve's replicas answer that in a message of its own, before they begin. Baton bounds what it sends itself, and a
    replica that is about to go must still hear of aborts, so the message is only a delay: about a millisecond and a
    half of each call.
    """

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> ReplicaResult:
        """Serve's hook for sending a call."""
        result = super().try_send_request(pr, with_rejection=False)
        if with_rejection:
            result.get_rejection_response = _has_room  # type: ignore[method-assign]
        return result


async def _has_room() -> ReplicaQueueLengthInfo:
    return ReplicaQueueLengthInfo(accepted=True, num_ongoing_requests=0)


class PinnedRouter(RequestRouter):
    """Routes by the engine id in a call's first argument."""

    def initialize_state(self, departed_s: float = 0.0, **kwargs: Any) -> None:
        """Serve's hook for a router's own arguments.

        Args:
            departed_s: so long after Serve took it away a replica may still be draining.
        """
        super().initialize_state(**kwargs)
        self._departed_s = departed_s
        self._by_engine: dict[str, RunningReplica] = {}
        self._departed: dict[str, float] = {}  # engine id -> when it is certainly gone

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take Serve's news of the replicas and pass them on to the fleet."""
        super().update_replicas(replicas)
        here = {str(r.replica_metadata.get("engine_id")): r for r in replicas if r.replica_metadata}
        now = time.monotonic()
        for engine_id in self._by_engine.keys() - here.keys():
            if now > self._departed.setdefault(engine_id, now + self._departed_s):
                del self._by_engine[engine_id], self._departed[engine_id]
        for engine_id in here:
            self._departed.pop(engine_id, None)
        self._by_engine.update(here)
        facts = [dict(r.replica_metadata) for r in replicas if r.replica_metadata]
        engine_board.publish(self._deployment_id.app_name, self._deployment_id.name, facts)

    def create_replica_wrapper(self, replica_info: RunningReplicaInfo) -> RunningReplica:
        """Serve's hook for how replicas are called."""
        return WillingReplica(replica_info)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        engine_id = pending_request.args[0] if pending_request.args else None
        if engine_id is not None:
            replica = self._by_engine.get(engine_id)
            # Serve tries again when a replica has died, can't be reached or takes no more calls: it is gone to us.
            if replica is None or is_retry:
                raise EngineGone(engine_id)
            return replica
        while not self._replicas_list:
            self._replicas_updated_event.clear()
            await self._replicas_updated_event.wait()
        return self._replicas_list[0]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Required by Serve's interface; the choice is made above."""
        return [candidate_replicas]
