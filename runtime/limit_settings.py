"""The settings of patience: how long anything may take, and how often it is tried again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kv_transfer.settings import Settings
from runtime.grace import GracePeriods


class LimitSettings(Settings):
    """Bounds and budgets."""

    retry_budget: int = Field(
        3,
        ge=0,
        le=100,
        description="How often a request goes on elsewhere after a loss (a dead worker, a failed pull).",
    )
    resume: Literal["all", "exact"] = Field(
        "all",
        description="Which streams go on elsewhere when their decode worker dies: `all` that can, or only those that "
        "go on `exact`ly (not with a seed or a presence penalty). The others end with an error.",
    )
    wait_for_worker_s: float = Field(
        120.0, ge=0, description="How long a request waits for a worker while there is none, in seconds."
    )
    pull_timeout_s: float = Field(
        60.0,
        gt=0,
        description="A pull of KV blocks that takes longer is given up, and its request planned anew, in seconds.",
    )
    drain_s: float = Field(
        120.0,
        ge=0,
        description="How long a worker that is to go (scale-down, update, shutdown) may take to finish what it has, in "
        "seconds; streams that take longer move to another worker. Ray Serve's, KServe's and Kubernetes' grace periods "
        "follow from it (`baton check` prints them).",
    )
    engine_hang_s: float = Field(
        300.0,
        gt=0,
        description="An engine that has work and makes no step for this long is taken for dead, in seconds. Longer "
        "than the longest step.",
    )
    start_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="How long a start may take before it is given up, in seconds. Progress deadlines on Kubernetes "
        "follow from it.",
    )

    @property
    def grace(self) -> GracePeriods:
        """Everybody's patience with what is to go."""
        return GracePeriods.of(self.drain_s, self.wait_for_worker_s)
