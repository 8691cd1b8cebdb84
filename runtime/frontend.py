"""vLLM's own OpenAI front end over the cluster: one FastAPI app, used by Ray Serve and by KServe alike."""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from vllm.engine.arg_utils import FlexibleArgumentParser
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from decode.request import without_engine_args
from runtime.bad_input import answer_bad_input, checked_parameters
from runtime.cache_view import CacheView
from runtime.cluster import Cluster
from runtime.config import Config
from runtime.edge import Edge
from runtime.fleet_metrics import FleetMetrics, serve_alone
from runtime.insight import explain_route, placement_record
from runtime.placement import Placement
from runtime.pool_metrics import PoolMetrics, fleet_snapshot
from runtime.reporter import Reporter
from runtime.visit import Reception, current_visit
from runtime.warmup import Warmer

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from vllm.config import VllmConfig

logger = logging.getLogger("baton.frontend")

CLOSED_PATHS = ("/scale_elastic_ep", "/is_scaling_elastic_ep")
"""vLLM's routes that change an engine's processes; the fleet is Ray Serve's to change."""


COMPLAINERS = (
    "vllm.entrypoints.generate.base.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.entrypoints.anthropic.serving",
    "vllm.entrypoints.anthropic.api_router",
)
"""Where vLLM logs each request that ends without an answer as an internal error, refused ones too."""


class FrontEndLLM(AsyncLLM):
    """vLLM's `AsyncLLM` whose engine core is the cluster."""

    @classmethod
    def over(cls, cluster: Cluster, config: VllmConfig) -> FrontEndLLM:
        """Build the front end over `cluster`. The one place where our client is put in for vLLM's own."""
        # vLLM would close all handlers of this process, and with them Ray Serve's log.
        config.logging_config.configure_logging = False
        with mock.patch.object(EngineCoreClient, "make_async_mp_client", staticmethod(lambda **_: cluster)):
            return cls(config, Executor.get_class(config), log_stats=True, log_requests=False)

    @property
    def cluster(self) -> Cluster:
        """The engine core, by its right name."""
        cluster: Cluster = self.engine_core
        return cluster

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, but without KV parameters of a client's own."""
        if isinstance(params, SamplingParams):
            params = without_engine_args(params)
        with checked_parameters():
            return await super().add_request(request_id, prompt, params, *args, **kwargs)

    def sleeps(self) -> bool:
        """Whether both pools sleep on purpose, so that a request has to wake them."""
        return False

    async def check_health(self) -> None:
        """Healthy means that both pools can serve, or sleep on purpose. `/health` answers 503 otherwise."""
        if not self.cluster.fleet.ready() and not self.sleeps():
            raise EngineDeadError()


@dataclass(frozen=True)
class FrontEnd:
    """A running front end: the app to serve, and what to stop.

    Attributes:
        app: vLLM's FastAPI app, for mounting elsewhere.
        asgi: the same behind its edge (API keys, body limit): what a server serves.
        collectors: what it has in this process' registry of metrics.
    """

    app: FastAPI
    asgi: ASGIApp
    llm: FrontEndLLM
    warmer: Warmer
    reporter: Reporter
    collectors: tuple[Any, ...]

    def shutdown(self) -> None:
        """Stop; the workers abort what was ours."""
        for collector in self.collectors:
            with suppress(KeyError):  # it was stopped before
                REGISTRY.unregister(collector)
        self.reporter.stop()
        self.warmer.stop()
        self.llm.shutdown()


def not_a_refusal(record: logging.LogRecord) -> bool:
    """A log filter: drops what is said while a refused request is worked on."""
    visit = current_visit.get()
    return visit is None or visit.refusal is None


async def start_front_end(
    config: Config,
    handles: dict[str, DeploymentHandle],
    scaler: DeploymentHandle | None = None,
    application: str | None = None,
    token: str | None = None,
) -> FrontEnd:
    """Connect to both pools, warm every path through them, and return the app once both can serve.

    Args:
        scaler: the brain of the pools' sizes, where they have more than one.
        application: what the Serve application is called, where that is not `config.name`.
        token: what the workers know this application by; worked out from `config` where it is not given.
    """
    front_end, token = uuid.uuid4().hex, token or config.token()
    prefill_is_up = handles["prefill"].call.remote(None, token, "state", [])
    vllm_config = await handles["decode"].describe.remote(None, token)
    await prefill_is_up
    traces = vllm_config.observability_config.otlp_traces_endpoint = config.front_end.otlp_traces_endpoint
    placement = Placement(config.routing.policy(), CacheView(config.routing.index_blocks), traced=bool(traces))
    cluster = Cluster(config.limits, placement, config.admission.policy(), config.objectives.policy())
    cluster.connect(front_end, handles, token)
    llm = FrontEndLLM.over(cluster, vllm_config)
    application = application or config.name
    cluster.fleet.follow(application)
    placement.cache.follow(application, (handle.deployment_name for handle in handles.values()))
    for name in COMPLAINERS:
        logging.getLogger(name).addFilter(not_a_refusal)
    warmer = Warmer(llm, cluster)
    warmer.start()
    await asyncio.wait_for(warmer.both_pools(), config.limits.start_timeout_s)
    alone = serve_alone() if config.front_end.replicas > 1 else ("", 0)
    reporter = Reporter(front_end, cluster, scaler, config.replicas(), alone)
    llm.sleeps = functools.partial(reporter.sleeps, config.limits.wait_for_worker_s)  # type: ignore[method-assign]
    collectors: tuple[Any, ...] = (cluster.seen, PoolMetrics(cluster, reporter))
    for collector in collectors:
        REGISTRY.register(collector)
    reporter.start()
    app = await _build_app(config, llm)
    _add_own_routes(app, cluster, reporter)
    edge = Edge(
        app,
        max_body_bytes=config.front_end.max_body_bytes,
        api_keys=config.api_keys(),
        reception=Reception(config.admission),
        max_requests=config.front_end.max_requests,
    )
    return FrontEnd(app, edge, llm, warmer, reporter, collectors)


async def _build_app(config: Config, llm: FrontEndLLM) -> FastAPI:
    args = _server_args(config)
    app = build_app(args, ("generate",), llm.model_config)
    answer_bad_input(app)
    await init_app_state(llm, app.state, args, ("generate",))
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") not in CLOSED_PATHS]
    return app


def _add_own_routes(app: FastAPI, cluster: Cluster, reporter: Reporter) -> None:
    """`/metrics` of the whole fleet in place of vLLM's, and `/baton/fleet`, the same for people and scripts."""
    metrics = FleetMetrics(
        lambda: (worker.link.facts for worker in cluster.fleet.workers.values()),
        lambda: reporter.status.front_ends if reporter.status else (),
        reporter.front_end,
    )
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") != "/metrics"]
    app.router.routes.append(Route("/metrics", metrics, methods=["GET"]))

    async def fleet(request: Request) -> JSONResponse:
        return JSONResponse({**fleet_snapshot(cluster, reporter), "placement": placement_record(cluster)})

    app.router.routes += [Route("/baton/fleet", fleet, methods=["GET"]), explain_route(cluster)]


def _server_args(config: Config) -> Any:
    """The namespace that vLLM's server would have made of its command line."""
    settings = config.front_end
    line = ["--model", config.engine_settings("decode").model, "--served-model-name", config.model_name]
    for name in ("reasoning_parser", "chat_template"):
        if value := getattr(settings, name):
            line += [f"--{name.replace('_', '-')}", value]
    if settings.tool_call_parser:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    line += ["--enable-prompt-tokens-details", *settings.args]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(line)
