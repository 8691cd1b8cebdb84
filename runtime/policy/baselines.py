"""Simple policies to compare with: they disaggregate every request that can be, and predict nothing."""

from __future__ import annotations

from runtime.policy.types import Disaggregated, Local, Plan, RequestView, Snapshot, WorkerView


def in_turn(request: RequestView, snapshot: Snapshot, turn: int) -> Plan:
    """Round robin over each pool; `turn` counts requests. The snapshot has a worker."""
    if snapshot.prefill and snapshot.decode and request.can_disaggregate:
        prefill, decode = snapshot.prefill[turn % len(snapshot.prefill)], snapshot.decode[turn % len(snapshot.decode)]
        return Disaggregated(prefill.engine_id, decode.engine_id, "round_robin")
    pool = snapshot.decode or snapshot.prefill
    return Local(pool[turn % len(pool)].engine_id, "round_robin")


def least_loaded(request: RequestView, snapshot: Snapshot) -> Plan:
    """The worker of each pool with the fewest requests, of all front ends. The snapshot has a worker."""
    if snapshot.prefill and snapshot.decode and request.can_disaggregate:
        prefill, decode = min(snapshot.prefill, key=_requests), min(snapshot.decode, key=_requests)
        return Disaggregated(prefill.engine_id, decode.engine_id, "least_loaded")
    return Local(min(snapshot.decode or snapshot.prefill, key=_requests).engine_id, "least_loaded")


def _requests(worker: WorkerView) -> tuple[int, int, str]:
    return worker.queued_requests + worker.streams, worker.requests, worker.engine_id
