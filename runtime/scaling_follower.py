"""Ray Serve's autoscaling policy for Baton's deployments: follow the scaler, whatever it says.

Serve's controller calls it for each deployment several times a second. The scaler's deployment brings the answer in
(its replica records it as autoscaling statistics), the pools' deployments take it. Their replicas record how much of
their KV is needed, which says who leaves when a pool shrinks.
"""

from __future__ import annotations

from typing import Any

FOLLOWER = "runtime.scaling_follower:follow"

SCALER = "scaler"
"""Name of the deployment that gives the answers."""


def follow(context: Any) -> tuple[int, dict[str, Any]]:
    """The number of replicas for the deployment of this context (`serve.config.AutoscalingContext`)."""
    from kv_transfer.load import NEEDED_TOKENS
    from runtime import departures, scaling_board

    if context.deployment_name != SCALER:
        told = (context.raw_metrics or {}).get(NEEDED_TOKENS, {})
        departures.post(context.app_name, context.deployment_name, _fresh(told, context.current_time))
        answer = scaling_board.look(context.app_name, context.deployment_name, context.current_time)
        return context.target_num_replicas if answer is None else answer, {}
    for pool, series in (context.raw_metrics or {}).items():
        points = [point for replica in series.values() for point in replica]
        if pool in ("prefill", "decode") and points:
            last = max(points, key=lambda point: point.timestamp)
            scaling_board.post(context.app_name, pool, last.timestamp, round(last.value))
    return 1, {}


def _fresh(told: dict[Any, Any], now: float) -> dict[Any, float]:
    """The last figure of each replica that has told one lately."""
    from runtime.scaling_board import BELIEVED_S

    return {
        replica: points[-1].value
        for replica, points in told.items()
        if points and now - points[-1].timestamp <= BELIEVED_S
    }
