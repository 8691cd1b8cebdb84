"""A front end's side of scaling: reports every second, and keeps what came of it for metrics and `baton top`."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runtime.brain import Brain
from runtime.reports import FleetStatus, report
from runtime.scaling_board import BELIEVED_S

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from runtime.cluster import Cluster

logger = logging.getLogger("baton.reporter")

REPORT_S = 1.0

ANSWER_S = 5.0
"""Longest wait for the scaler: it is not there while it is replaced."""


class Reporter:
    """Reports to the scaler, or to a brain of its own where there is none.

    Args:
        scaler: the scaler's deployment; None where there is none.
        replicas: so many workers each pool was given.
        metrics: host and port where this front end alone can be scraped; port 0: nowhere.

    Attributes:
        status: the last one, however old. It still says where the other front ends are.
    """

    def __init__(
        self,
        front_end: str,
        cluster: Cluster,
        scaler: DeploymentHandle | None,
        replicas: Mapping[str, int],
        metrics: tuple[str, int] = ("", 0),
    ) -> None:
        self.front_end = front_end
        self.status: FleetStatus | None = None
        self._cluster = cluster
        self._scaler = scaler
        self._metrics = metrics
        self._brain = Brain(None, replicas)
        self._answered_s = 0.0
        self._asleep_s: float | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to report."""
        # As `Link`: handle calls must belong to no request.
        self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    def stop(self) -> None:
        """Stop reporting."""
        if self._task is not None:
            self._task.cancel()

    def believed(self) -> FleetStatus | None:
        """The last status; None once there has been no answer for as long as Ray Serve follows one."""
        return self.status if time.monotonic() - self._answered_s <= BELIEVED_S else None

    def sleeps(self, waking_s: float) -> bool:
        """Whether there are no workers on purpose: they sleep, or were woken less than `waking_s` ago."""
        return self._asleep_s is not None and time.monotonic() - self._asleep_s < waking_s

    async def _run(self) -> None:
        while True:
            try:
                await self._report()
            except Exception as error:  # whatever it was: serving goes on, and the next report may get through
                logger.warning("the scaler does not answer: %r", error)
            await asyncio.sleep(REPORT_S)

    async def _report(self) -> None:
        mine = report(self.front_end, self._cluster, self._metrics)
        if self._scaler is None:
            now = time.monotonic()
            self._brain.tell(mine, now)
            status = self._brain.decide(now)
        else:
            async with asyncio.timeout(ANSWER_S):
                status = await self._scaler.report.remote(mine)
        if status is None:
            return
        self.status, self._answered_s = status, time.monotonic()
        if status.scaled and not status.answer.prefill.workers and not status.answer.decode.workers:
            self._asleep_s = time.monotonic()
