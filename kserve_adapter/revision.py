"""The application that a predictor serves through: join its Ray cluster, have it deployed, keep it, leave it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import threading
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from kserve_adapter import keeper
from kserve_adapter.ray_node import RayNode, StartFailed
from runtime.config import ROLES, Config
from runtime.scaling_follower import SCALER
from runtime.serving import start_ray

logger = logging.getLogger("baton.revision")

T = TypeVar("T")

POLL_S = 0.5
GOODBYE_S = 5.0


def revision_name(config: Config) -> str:
    """The application's name where none is given: the model and a digest of all that its pools are made of.

    Two predictors with the same settings share an application, and a change of the model, of its weights' version or
    of an engine argument is another one. The front end's own settings are not part of it.
    """
    digest = hashlib.sha256(json.dumps(keeper.pool_settings(config), sort_keys=True).encode()).hexdigest()[:8]
    stem = re.sub(r"[^a-z0-9]+", "-", config.model_name.lower()).strip("-")[:40].rstrip("-")
    return f"{stem or 'model'}-{digest}"


class Revision:
    """One predictor's part in the application `config.name`.

    Args:
        address: the Ray cluster: `HOST:PORT` of its head, `auto` for a node that runs on this machine already, None
            for one of this process's own.
        linger_s: how long the application outlives its last predictor.
        joined: called once this process is part of the cluster: Ray has put signal handlers of its own in place, which
            abort at a second SIGTERM.
    """

    def __init__(self, config: Config, address: str | None, linger_s: float, joined: Callable[[], object]) -> None:
        self.config = config
        self._address = address
        self._linger_s = linger_s
        self._joined = joined
        self._member = uuid.uuid4().hex
        self._owned = False
        self._keeper: Any = None
        self._node: RayNode | None = None
        self._handles: dict[str, DeploymentHandle] = {}
        self._given_up = threading.Event()
        # Of its own: Ray's processes get a SIGKILL when the thread ends that started them.
        self._thread = ThreadPoolExecutor(1, "baton-ray")
        self._in_thread: asyncio.Future[Any] | None = None
        self._heart: asyncio.Task[None] | None = None

    async def open(self) -> dict[str, DeploymentHandle]:
        """Join the cluster, have the application deployed if it is not there; handles of roles and scaler.

        Raises:
            StartFailed: no cluster, or an application of this name with other settings.
        """
        await self._uncancelled(self._join_cluster)
        self._joined()
        if self._address is None:
            await self._uncancelled(keeper.deploy_once, self.config, False)
        else:
            await self._join()
            self._heart = asyncio.get_running_loop().create_task(self._beat())
        self._handles = await self.unless_it_fails(self._deployed())
        return dict(self._handles)

    async def _uncancelled(self, work: Callable[..., object], *args: Any) -> None:
        """Work in a thread, which can't be cancelled: `close` waits for it where this is."""
        self._in_thread = asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        await asyncio.shield(self._in_thread)

    async def _deployed(self) -> dict[str, DeploymentHandle]:
        """The deployments appear some time after their application."""
        while True:
            with contextlib.suppress(KeyError):
                return {role: serve.get_deployment_handle(role, self.config.name) for role in (*ROLES, SCALER)}
            await asyncio.sleep(POLL_S)

    async def unless_it_fails(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that waits for the application's workers.

        Raises:
            StartFailed: when Ray Serve gives the application up.
        """
        tasks: tuple[asyncio.Task[T], asyncio.Task[str]] = (
            asyncio.ensure_future(work),
            asyncio.ensure_future(self._failure()),
        )
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise StartFailed(f"application {self.config.name} failed: {tasks[1].result()}")
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()

    async def _failure(self) -> str:
        while True:
            application = (await asyncio.to_thread(serve.status)).applications.get(self.config.name)
            if application is not None and application.status.value == "DEPLOY_FAILED":
                return application.message
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Say goodbye to the keeper; a shared application goes when its last predictor has."""
        self._given_up.set()
        if self._in_thread is not None:
            await asyncio.wait({self._in_thread})
        if self._heart is not None:
            self._heart.cancel()
        if self._keeper is not None:  # which may know this predictor although its answer was not waited for
            with contextlib.suppress(RayActorError, TimeoutError):  # a cluster that has gone does not answer at all
                async with asyncio.timeout(GOODBYE_S):
                    await self._keeper.leave.remote(self._member)

    def _join_cluster(self) -> None:
        if self._address not in (None, "auto"):
            self._node = RayNode(str(self._address), given_up=self._given_up)
        start_ray(self._address)

    def leave_cluster(self) -> None:
        """Leave the cluster, or end it where it is this process's own. In the main thread, after the event loop."""
        if ray.is_initialized():
            if self._address is None:
                serve.shutdown()
            # Routers outlive Ray's shutdown and report every few seconds, for which Ray would start a cluster anew.
            for handle in self._handles.values():
                handle.shutdown()
            ray.shutdown()
        if self._node is not None:
            self._node.stop()

    async def _join(self) -> None:
        """Tell the keeper of this predictor, and again while the keeper is on its way out or being restarted."""
        while True:
            with contextlib.suppress(RayActorError):
                if self._keeper is None:
                    self._keeper = keeper.keeper(self.config, self._linger_s)
                answer = await self._keeper.join.remote(self._member, self.config.model_dump(), self._owned)
                if not answer["same"]:
                    raise StartFailed(
                        f"application {self.config.name} runs with other settings: give this revision its own "
                        "--application, or none, and it is named by its settings"
                    )
                self._owned = answer["owned"]
                if not answer["closing"]:
                    return
            self._keeper = None
            await asyncio.sleep(POLL_S)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(keeper.HEARTBEAT_S)
            try:
                await self._join()
            except Exception as error:  # whatever it is, the next beat may get through
                logger.warning("the keeper of %s did not hear this predictor: %s", self.config.name, error)
