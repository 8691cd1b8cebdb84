"""KServe's `ModelServer` with Baton's OpenAI front end on the same FastAPI app.

KServe's v1 and v2 routes and its gRPC service stay KServe's; `/openai/v1/…` is the app that Ray Serve's ingress serves
too, behind its edge. KServe's own OpenAI routes need vLLM modules that 0.32 has not got, and are thinner.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from concurrent import futures
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastapi import Request
from grpc import aio
from kserve import ModelRepository, ModelServer
from kserve.errors import InvalidInput
from kserve.model_server import app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from kserve_adapter.model import BatonModel, NotServed
from kserve_adapter.whole_request import WholeRequest
from runtime.errors import STATUS, Refusal, openai_body, retry_after

if TYPE_CHECKING:
    from runtime.frontend import FrontEnd

logger = logging.getLogger("baton.kserve")

OPENAI_PREFIX = "/openai"
REQUIRED = ("/v1/chat/completions", "/v1/completions", "/v1/models")
"""Routes without which there is no OpenAI API: a start without them fails."""


class TruthfulDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's, except that the server is ready only when its model is."""

    async def ready(self) -> bool:
        """Whether every model can serve; KServe's own says True always."""
        registry = self.model_registry
        return all([await registry.is_model_ready(name) for name in registry.get_models()])


class FixedModels(ModelRepositoryExtension):  # type: ignore[misc]
    """A predictor's model is fixed: no client can unload it."""

    async def load(self, model_name: str) -> None:
        """Refuse. Raises InvalidInput always."""
        raise InvalidInput("This server's model is fixed: deploy another revision instead of loading one here.")

    async def unload(self, model_name: str) -> None:
        """Refuse. Raises InvalidInput always."""
        raise InvalidInput("This server's model is fixed: delete its InferenceService instead of unloading it here.")


class LocalGrpcServer(GRPCServer):  # type: ignore[misc]
    """KServe's gRPC server on a given address, without a log line per call."""

    def __init__(self, host: str, max_message_bytes: int, *args: Any) -> None:
        super().__init__(*args)
        self._host = host
        self._max_message_bytes = max_message_bytes

    async def start(self, max_workers: int) -> None:
        """Serve until `stop`."""
        options = [(f"grpc.max_{way}_message_length", self._max_message_bytes) for way in ("send", "receive")]
        self._server = aio.server(
            futures.ThreadPoolExecutor(max_workers), interceptors=(ExceptionToStatusInterceptor(),), options=options
        )
        servicer = InferenceServicer(self._data_plane, self._model_repository_extension)
        add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        self._server.add_insecure_port(f"{self._host}:{self._port}")
        await self._server.start()
        await self._server.wait_for_termination()


class OpenAI:
    """The front end under a prefix, or a typed refusal while there is none."""

    def __init__(self, model: BatonModel) -> None:
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, or refuse in OpenAI's shape."""
        if self._model.asgi is not None:
            await self._model.asgi(scope, receive, send)
            return
        refusal = Refusal("starting", f"The model {self._model.name} is not ready.", retry_after_s=5)
        headers = {"x-baton-refusal": refusal.reason, "retry-after": str(retry_after(refusal))}
        await JSONResponse(openai_body(refusal), STATUS[refusal.reason], headers)(scope, receive, send)


class Server(ModelServer):  # type: ignore[misc]
    """A predictor's server: up at once, ready when the front end is, and drained before the workers are let go.

    Args:
        start: brings the front end up.
        stop: lets its revision go; called once everything has been answered, whatever happened before.
        prefix: a further prefix for the OpenAI API, beside `/openai`; the empty one is the root.
        grace_s: how long streams may run on after SIGTERM.
    """

    def __init__(
        self,
        model: BatonModel,
        start: Callable[[], Awaitable[FrontEnd]],
        stop: Callable[[], Awaitable[None]],
        *,
        host: str,
        prefix: str,
        max_body_bytes: int,
        grace_s: int,
        with_grpc: bool,
        **kwargs: Any,
    ) -> None:
        registry = ModelRepository()
        super().__init__(registered_models=registry, grace_period=grace_s, enable_grpc=False, **kwargs)
        self.dataplane = TruthfulDataPlane(model_registry=registry)
        self.model_repository_extension = FixedModels(registry)
        self._model, self._host, self._prefix = model, host, prefix
        self._start, self._let_go = start, stop
        self._max_body_bytes, self._with_grpc = max_body_bytes, with_grpc
        self.failed: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> int:
        """Serve until SIGINT or SIGTERM; returns the exit status, 1 after a start that failed."""
        # KServe tries to import its own OpenAI routes, which takes long and fails with this vLLM: let it fail at once.
        sys.modules["kserve.protocol.rest.openai.config"] = None  # type: ignore[assignment]
        app.add_middleware(WholeRequest, max_body_bytes=self._max_body_bytes)
        app.add_exception_handler(NotServed, _refused)
        for prefix in {OPENAI_PREFIX, self._prefix} - {""}:
            app.router.routes.append(Mount(prefix, OpenAI(self._model)))
        self.start([self._model])
        return 1 if self.failed else 0

    def _register_and_check_atleast_one_model_is_ready(self, models: list[BatonModel]) -> None:
        """KServe's hook before the servers start: register, though nothing is ready yet."""
        for model in models:
            self.register_model(model)
            model.enable_latency_logging = self.enable_latency_logging
        if self._with_grpc:
            self._grpc_server = LocalGrpcServer(
                self._host,
                self._max_body_bytes,
                self.grpc_port,
                self.dataplane,
                self.model_repository_extension,
                {},
                self.grace_period,
            )
            self.servers.append(self._grpc_server.start(self.max_threads))

    def register_signal_handler(self) -> None:
        """Drain on SIGINT and SIGTERM, from the first moment on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    async def _serve(self) -> None:
        """Serve until told to stop; the front end outlives the last response, the revision outlives the front end."""
        self._loop = asyncio.get_running_loop()
        self._stopping, self._drained = asyncio.Event(), asyncio.Event()
        uvicorn_server = self._rest_server._server
        uvicorn_server.config.host = self._host
        self._exit_uvicorn = uvicorn_server.handle_exit
        uvicorn_server.handle_exit = self._on_signal
        engine = asyncio.create_task(self._run_front_end())
        try:
            await asyncio.gather(*self.servers)
        finally:
            self._drained.set()
            await engine

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._loop is None:
            sys.exit(0)  # nothing has started
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._exit_uvicorn(number, frame)
        if not self._model.draining:
            logger.info("draining")
            self._model.draining = True
            if self._grpc_server is not None:
                asyncio.run_coroutine_threadsafe(self._grpc_server.stop(number), self._loop)

    async def _run_front_end(self) -> None:
        front_end: FrontEnd | None = None
        try:
            front_end = await self._started()
            if front_end is not None:
                self._attach(front_end)
                await self._drained.wait()
        except Exception as error:
            self.failed = str(error) or type(error).__name__
            logger.exception("the start failed")
            self._on_signal(signal.SIGTERM, None)
        finally:
            if front_end is not None:
                front_end.shutdown()
            await self._let_go()

    async def _started(self) -> FrontEnd | None:
        """The front end; None when the server was stopped before it was up."""
        start, stop = asyncio.ensure_future(self._start()), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            return start.result() if start.done() else None
        finally:
            start.cancel()
            stop.cancel()

    def _attach(self, front_end: FrontEnd) -> None:
        paths = {getattr(route, "path", "") for route in front_end.app.router.routes}
        if missing := [path for path in REQUIRED if path not in paths]:
            raise RuntimeError(f"the front end lacks the routes {missing}")
        self._model.attach(front_end.asgi, front_end.llm.cluster.fleet)
        # Before KServe's own, which knows this process alone: a scrape tells of the fleet, KServe's families included.
        app.router.routes.insert(0, Route("/metrics", front_end.asgi))
        if not self._prefix:
            app.router.routes.append(Mount("", OpenAI(self._model)))
        logger.info("ready: %s", self._model.name)


async def _refused(request: Request, problem: NotServed) -> JSONResponse:
    return JSONResponse({"error": problem.details}, problem.status, problem.headers)
