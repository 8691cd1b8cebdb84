"""How long everybody waits for a worker or front end that is to go: one setting (`limits.drain_s`), everybody's budget.

Each budget contains the one before it, so that nobody is cut off by somebody else's shorter patience.
"""

from __future__ import annotations

from dataclasses import dataclass

PRE_STOP_S = 15
"""How long a pod that is told to go keeps serving: what sends it traffic must hear of it first. KServe's own value."""

SERVE_MARGIN_S = 10.0
"""What a replica has between the last stream's move and Ray Serve's SIGKILL: streams end, engines stop."""

POD_MARGIN_S = 15.0
"""What a pod's processes have to end: a node's once Ray has drained it, a predictor's once its streams are over."""

NODE_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""Where `ray start --block` reads how long it may drain its node after SIGTERM: 30 s without it, 0 not at all."""


@dataclass(frozen=True)
class GracePeriods:
    """The budgets, in seconds.

    Attributes:
        pre_stop_s: how long a pod serves on before its processes get SIGTERM (`preStop`).
        move_s: after this a front end moves what a draining worker still has to other workers.
        serve_s: after this Ray Serve kills a replica (`graceful_shutdown_timeout_s`), and a predictor of KServe's cuts
            its streams (`--grace_period`).
        node_s: what a Ray node has after SIGTERM (`NODE_VARIABLE`). Ray Serve starts the replacements first and stops
            a replica `serve_s` before the end of this.
        pod_s: Kubernetes' `terminationGracePeriodSeconds`, which counts from before `preStop`.
    """

    pre_stop_s: float
    move_s: float
    serve_s: float
    node_s: float
    pod_s: float

    @classmethod
    def of(cls, drain_s: float, replace_s: float) -> GracePeriods:
        """The budgets for workers that may take `drain_s` to finish and `replace_s` to be replaced."""
        serve_s = drain_s + SERVE_MARGIN_S
        node_s = serve_s + replace_s
        return cls(PRE_STOP_S, drain_s, serve_s, node_s, PRE_STOP_S + node_s + POD_MARGIN_S)
