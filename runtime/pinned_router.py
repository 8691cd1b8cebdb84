"""Ray Serve's router for the two pools: sends a call to the engine it names, and tells the fleet who is there.

A handle call's first argument is the engine id that it is meant for (`None`: any replica). Baton has chosen the worker
before it calls; Serve only carries the call. So this router overrides the choice itself, not one step of it: there is
no queue, no probing and no retry elsewhere, and two concurrent calls can't be mistaken for each other.

Serve pickles this module by value into every process: state that is shared with the rest lives in `engine_board`.
"""

from __future__ import annotations

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


class PinnedRouter(RequestRouter):
    """Routes by the engine id in a call's first argument."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take Serve's news of the replicas and pass them on to the fleet."""
        super().update_replicas(replicas)
        self._by_engine = {str(r.replica_metadata.get("engine_id")): r for r in replicas if r.replica_metadata}
        facts = [dict(r.replica_metadata) for r in replicas if r.replica_metadata]
        engine_board.publish(self._deployment_id.app_name, self._deployment_id.name, facts)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        engine_id = pending_request.args[0] if pending_request.args else None
        if engine_id is not None:
            replica = getattr(self, "_by_engine", {}).get(engine_id)
            if replica is None:
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
