"""The composition root: `serve run runtime.app:build config=FILE` builds the whole application."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from kv_transfer.serve_replica import prepare_replica
from kv_transfer.worker_replica import WorkerReplica
from runtime.config import ROLES, Config, Role
from runtime.config_file import load
from runtime.errors import ConfigError
from runtime.pinned_router import ROUTER_CLASS
from runtime.scaler import replicas_of, scaler

logger = logging.getLogger("baton.app")

MAX_ONGOING = 1_000_000
"""Serve's own limit on calls to a replica. Baton's calls are short or one stream a front end; it bounds work itself."""


def build(args: dict[str, str]) -> Application:
    """Build the application that `serve run runtime.app:build config=FILE` runs.

    Raises:
        ConfigError: when the settings are wrong.
    """
    return application(load(_config_file(args)))


def _config_file(args: dict[str, str]) -> str:
    if set(args) != {"config"}:
        raise ConfigError("give exactly one argument: config=FILE")
    return args["config"]


def application(config: Config, *, own_server: bool = False) -> Application:
    """The front end, both pools and, where there is something to scale, the scaler, as one Serve application.

    Args:
        own_server: front ends listen on `front_end.host` and `port` themselves; else Serve's proxy brings requests.
    """
    pools = {role: _pool(config, role) for role in ROLES}
    front_end = serve.deployment(
        FrontEndReplica,
        name="front-end",
        num_replicas=config.front_end.replicas,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=config.limits.grace.serve_s,
    )
    return front_end.bind(config.model_dump(), config.token(), own_server=own_server, scaler=scaler(config), **pools)


def build_pools(args: dict[str, str]) -> Application:
    """Build both pools without a front end, for `serve run` and KubeRay's RayService: KServe's predictors are theirs.

    Raises:
        ConfigError: when the settings are wrong.
    """
    return pools_application(load(_config_file(args)))


def pools_application(config: Config) -> Application:
    """Both pools and the scaler as one Serve application, for front ends that live outside of it."""
    pools = {role: _pool(config, role) for role in ROLES}
    # It needs nothing, and what needs nothing Ray puts on any node, those of predictors too, which come and go.
    on_head = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    revision = serve.deployment(Revision, name="revision", num_replicas=1, ray_actor_options=on_head)
    return revision.bind(scaler=scaler(config, several=True), **pools)


def _pool(config: Config, role: Role) -> Application:
    deployment = serve.deployment(
        WorkerReplica,
        name=role,
        max_ongoing_requests=MAX_ONGOING,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER_CLASS, request_router_kwargs={"departed_s": config.limits.grace.serve_s}
        ),
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=config.limits.grace.serve_s,
        logging_config=LoggingConfig(enable_access_log=False),  # a call is a message here, not a request
        **replicas_of(config, role),
        **placement(config, role),
    )
    return deployment.bind(config.engine_settings(role).model_dump())


def placement(config: Config, role: Role) -> dict[str, Any]:
    """Where Ray puts a worker of this role: deployment options.

    A worker on one machine is one actor with all of its GPUs, so that vLLM's own processes see them. A worker over
    several machines gets a placement group with a bundle for the actor and one for each GPU; vLLM's Ray executor
    puts its workers there.
    """
    pool = config.pool(role)
    actor: dict[str, Any] = {"num_cpus": pool.num_cpus}
    if pool.label_selector:
        actor["label_selector"] = dict(pool.label_selector)
    if pool.nodes == 1:
        if pool.num_gpus:
            actor["num_gpus"] = pool.num_gpus
        if pool.resources:
            actor["resources"] = dict(pool.resources)
        return {"ray_actor_options": actor}
    bundles = [
        {"CPU": max(pool.num_cpus, 1.0), **pool.resources},
        *({"GPU": 1.0, **pool.resources} for _ in range(pool.num_gpus)),
    ]
    return {"ray_actor_options": actor, "placement_group_bundles": bundles, "placement_group_strategy": "PACK"}


class Revision:
    """What Serve takes for the application's ingress when the front ends are elsewhere: it holds the pools together."""

    def __init__(self, prefill: DeploymentHandle, decode: DeploymentHandle, scaler: DeploymentHandle) -> None:
        self.parts = (prefill, decode, scaler)


class _Delegate:
    """The ASGI app that Serve pickles before the replica exists; the real one can only be built inside."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = _running.get("app")
        assert app is not None  # Serve sends nothing before the replica's __init__ has returned
        await app(scope, receive, send)


_running: dict[str, ASGIApp] = {}


@serve.ingress(_Delegate())
class FrontEndReplica:
    """A Ray Serve replica that serves the OpenAI API over both pools."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: dict[str, Any],
        token: str,
        prefill: DeploymentHandle,
        decode: DeploymentHandle,
        own_server: bool,
        scaler: DeploymentHandle | None = None,
    ) -> None:
        from runtime.frontend import start_front_end  # vLLM's server: only where it runs
        from runtime.http_server import HttpServer

        prepare_replica()
        settings = Config.model_validate(config)
        self._drain_s = settings.limits.drain_s
        handles = {"prefill": prefill, "decode": decode}
        # `serve run` gives the application a name of its own.
        application = serve.get_replica_context().app_name
        self._front_end = await start_front_end(settings, handles, scaler, application, token)
        _running["app"] = self._front_end.asgi
        address = settings.front_end.host, settings.front_end.port
        self._server = HttpServer(self._front_end.asgi, *address, shared=True) if own_server else None

    async def __del__(self) -> None:
        """Ray Serve's hook for a replica that goes: open requests have `limits.drain_s` to finish."""
        if server := getattr(self, "_server", None):
            await server.stop(self._drain_s)
        if front_end := getattr(self, "_front_end", None):
            front_end.shutdown()
