"""The deployment that sizes the pools: front ends report to it, Ray Serve follows it, nothing waits for it.

Off every request's path. When it dies Serve starts another one, which begins with what there is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from kv_transfer.serve_replica import prepare_replica
from runtime.brain import Brain
from runtime.config import Config, Role
from runtime.policy.scaling_records import Answer
from runtime.reports import FleetStatus, FrontEndReport
from runtime.scaling_follower import FOLLOWER, SCALER

logger = logging.getLogger("baton.scaler")

DECIDE_S = 1.0
"""How often there is an answer."""

STATUS_S = 5.0
"""Longest wait for Ray Serve's word on its replicas."""

PUSH_S = 1.0
"""How often Ray Serve takes the answer to its controller."""

NEED_S = 5.0
"""How often it takes there how much of a worker's KV is needed."""


class Scaler:
    """The replica: one brain for both pools."""

    def __init__(self, config: dict[str, Any]) -> None:
        prepare_replica()
        self._application = serve.get_replica_context().app_name
        settings = Config.model_validate(config)
        self._brain = Brain(settings.scaling_policy(), settings.replicas())
        self._status: FleetStatus | None = None
        self._task = asyncio.get_running_loop().create_task(self._decide())

    async def report(self, report: FrontEndReport) -> FleetStatus | None:
        """Take a front end's report; returns the last decision."""
        self._brain.tell(report, time.monotonic())
        return self._status

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve's hook: the answer, on its way to the policies in Serve's controller."""
        if self._status is None or not self._status.scaled:
            return {}
        answer = self._status.answer
        return {"prefill": float(answer.prefill.workers), "decode": float(answer.decode.workers)}

    def check_health(self) -> None:
        """Raise when nobody decides any more."""
        if self._task.done():
            self._task.result()

    async def _decide(self) -> None:
        replicas: dict[str, dict[str, int]] | None = None
        while True:
            try:
                async with asyncio.timeout(STATUS_S):
                    replicas = await asyncio.to_thread(self._replicas)
            except Exception as error:  # Serve's controller may be away for a moment: what it said last will do
                logger.warning("Ray Serve does not tell its replicas: %r", error)
            before, self._status = self._status, self._brain.decide(time.monotonic(), replicas)
            if self._status is not None:
                _log_change(before.answer if before else None, self._status.answer)
            await asyncio.sleep(DECIDE_S)

    def _replicas(self) -> dict[str, dict[str, int]] | None:
        """The replicas of each deployment by their state, as Ray Serve has them."""
        application = serve.status().applications.get(self._application)
        if application is None:
            return None
        return {name: living(deployment.replica_states) for name, deployment in application.deployments.items()}


def living(states: Mapping[str, int]) -> dict[str, int]:
    """Replicas by state without those that are gone. Serve gives states as strings, though it says otherwise."""
    named = {str(getattr(state, "value", state)): count for state, count in states.items()}
    return {state: count for state, count in named.items() if state != "STOPPED"}


def _log_change(before: Answer | None, after: Answer) -> None:
    for pool in ("prefill", "decode"):
        was, now = getattr(before, pool, None), getattr(after, pool)
        if was is None or was.workers != now.workers:
            logger.info("%s pool: %d workers (%s: %s)", pool, now.workers, now.reason, now.why)


def scaler(config: Config, *, several: bool = False) -> Application | None:
    """The scaler's part of the application; None for one front end that does not scale.

    Args:
        several: there may be more front ends than the settings say.
    """
    if config.scaling_policy() is None and config.front_end.replicas == 1 and not several:
        return None
    deployment = serve.deployment(
        Scaler,
        name=SCALER,
        ray_actor_options={"num_cpus": 0.05},
        autoscaling_config=_follow(least=1, start=1, most=1, push_s=PUSH_S),
    )
    return deployment.bind(config.model_dump())


def replicas_of(config: Config, role: Role) -> dict[str, Any]:
    """Deployment options: how many replicas a pool has, and who changes that."""
    if config.scaling_policy() is None:
        return {"num_replicas": config.pool(role).replicas}
    bounds = config.bounds(role)
    return {"autoscaling_config": _follow(bounds.least, config.pool(role).replicas, bounds.most, NEED_S)}


def _follow(least: int, start: int, most: int, push_s: float) -> AutoscalingConfig:
    """Serve's autoscaling without any judgement of its own."""
    return AutoscalingConfig(
        min_replicas=least,
        initial_replicas=start,
        max_replicas=most,
        upscale_delay_s=0,
        downscale_delay_s=0,
        metrics_interval_s=push_s,
        look_back_period_s=10 * push_s,
        policy=AutoscalingPolicy(policy_function=FOLLOWER),
    )
