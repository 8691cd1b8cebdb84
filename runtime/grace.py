"""How long everybody waits for a worker or front end that is to go: one setting (`limits.drain_s`), four budgets.

Each budget contains the one before it, so that nobody is cut off by somebody else's shorter patience.
"""

from __future__ import annotations

from dataclasses import dataclass

SERVE_MARGIN_S = 10.0
"""What a replica has between the last stream's move and Ray Serve's SIGKILL: streams end, engines stop."""

POD_MARGIN_S = 10.0
"""What a node's processes have to end once Ray has drained it."""


@dataclass(frozen=True)
class GracePeriods:
    """The budgets, in seconds.

    Attributes:
        move_s: after this a front end moves what a draining worker still has to other workers.
        serve_s: after this Ray Serve kills a replica (`graceful_shutdown_timeout_s`); KServe's `grace_period`.
        node_s: what a Ray node has after SIGTERM (`RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S`). Ray Serve starts the
            replacements first and stops a replica `serve_s` before the end of this.
        pod_s: Kubernetes' `terminationGracePeriodSeconds`.
    """

    move_s: float
    serve_s: float
    node_s: float
    pod_s: float

    @classmethod
    def of(cls, drain_s: float, replace_s: float) -> GracePeriods:
        """The budgets for workers that may take `drain_s` to finish and `replace_s` to be replaced."""
        serve_s = drain_s + SERVE_MARGIN_S
        node_s = serve_s + replace_s
        return cls(drain_s, serve_s, node_s, node_s + POD_MARGIN_S)
