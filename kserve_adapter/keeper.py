"""Who keeps a revision's application: the predictors that serve through it.

A named actor in the Ray cluster, one for each application, knows the predictors by their heartbeats. The first one has
it deploy the application; some time after the last one has left or gone silent, it removes it and itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve

from runtime.app import pools_application
from runtime.config import Config

logger = logging.getLogger("baton.keeper")

HEARTBEAT_S = 5.0
SILENCE_S = 30.0
"""A predictor that has not been heard of for this long is gone: it was killed, or its node was."""

NAMESPACE = "baton"
HEAD_NODE = {"node:__internal_head__": 0.001}
"""Ray's own resource of a cluster's head: the keeper lives as long as the cluster, not as a predictor's pod."""


@dataclass
class Membership:
    """Which predictors serve through an application, and since when none has. Pure: the clock is an argument.

    Attributes:
        linger_s: how long an application outlives its last predictor.
    """

    linger_s: float
    heard: dict[str, float] = field(default_factory=dict)
    alone_since: float | None = None

    def join(self, member: str, now: float) -> bool:
        """Note a sign of life; whether the member is new."""
        new = member not in self.heard
        self.heard[member] = now
        self.alone_since = None
        return new

    def leave(self, member: str, now: float) -> None:
        """Forget a member that said goodbye."""
        self.heard.pop(member, None)
        self._note(now)

    def expired(self, now: float) -> bool:
        """Whether the application is to go: silent members are forgotten, and nobody has been here for `linger_s`."""
        for member in [member for member, heard in self.heard.items() if now - heard > SILENCE_S]:
            del self.heard[member]
        self._note(now)
        return self.alone_since is not None and now - self.alone_since >= self.linger_s

    def _note(self, now: float) -> None:
        if self.heard:
            self.alone_since = None
        elif self.alone_since is None:
            self.alone_since = now


class Keeper:
    """The actor. Its application's name is its own."""

    def __init__(self, settings: dict[str, Any], linger_s: float) -> None:
        self._config = Config.model_validate(settings)
        self._members = Membership(linger_s)
        self._owns = False
        self._closing = False
        self._deploying = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None

    async def join(self, member: str, settings: dict[str, Any], owned: bool) -> dict[str, Any]:
        """A predictor's first call and its heartbeat: have the application deployed, keep it.

        Args:
            owned: what this returned before, so that a keeper that was restarted knows it again.

        Returns:
            `{"closing": bool, "same": bool, "owned": bool}`: whether to come back later because the application is
            being removed; whether the settings are those of the application; whether a keeper deployed it.
        """
        if self._closing:
            return {"closing": True, "same": True, "owned": False}
        if pool_settings(Config.model_validate(settings)) != pool_settings(self._config):
            return {"closing": False, "same": False, "owned": self._owns}
        self._owns = self._owns or owned
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._remove_when_alone())
        if self._members.join(member, time.monotonic()):
            async with self._deploying:
                self._owns = await asyncio.to_thread(deploy_once, self._config, self._owns) or self._owns
        return {"closing": False, "same": True, "owned": self._owns}

    async def leave(self, member: str) -> None:
        """A predictor's goodbye."""
        self._members.leave(member, time.monotonic())

    async def _remove_when_alone(self) -> None:
        while not self._members.expired(time.monotonic()):  # noqa: ASYNC110  # silence is no event
            await asyncio.sleep(0.5)
        self._closing = True
        try:
            if self._owns:
                logger.info("no predictor is left: %s is removed", self._config.name)
                await asyncio.to_thread(serve.delete, self._config.name)
        finally:  # or whoever comes next would wait for ever
            # Not `exit_actor`, which only works inside an actor's call; not an exit of the process: it is restarted.
            ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def pool_settings(config: Config) -> dict[str, Any]:
    """What an application is made of: all settings but the front end's own and the names."""
    return config.model_dump(exclude={"front_end", "name", "served_model_name", "kubernetes"})


def deploy_once(config: Config, owned: bool, timeout_s: float = 120.0) -> bool:
    """Deploy a revision's pools unless they are there; whether this call did. Waits for one that is being removed.

    One that failed to deploy is deployed again where it is `owned`; anybody else's, KubeRay's perhaps, is left alone.
    """
    serve.start(proxy_location="Disabled")
    deadline = time.monotonic() + timeout_s
    while True:
        application = serve.status().applications.get(config.name)
        if application is None or (owned and application.status.value == "DEPLOY_FAILED"):
            break
        if application.status.value != "DELETING":
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"application {config.name} has been in removal for {timeout_s:g} s")
        time.sleep(0.5)
    target = serve.RunTarget(pools_application(config), name=config.name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    return True


def keeper(config: Config, linger_s: float) -> Any:
    """The keeper of this revision's application in the Ray cluster; started if there is none."""
    actor = ray.remote(num_cpus=0, resources=HEAD_NODE, max_restarts=-1)(Keeper)
    return actor.options(
        name=f"keeper:{config.name}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(config.model_dump(), linger_s)
