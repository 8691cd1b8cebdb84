"""A predictor's routes as KServe and Baton lay them on the one app."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fastapi
import pytest
from kserve.protocol.rest.server import RESTServer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from kserve_adapter import server
from kserve_adapter.model import BatonModel
from runtime.admission_settings import AdmissionSettings
from runtime.edge import Edge
from runtime.fleet_metrics import FleetMetrics
from runtime.visit import Reception

WORKER = SimpleNamespace(engine_id="w1", role="decode", kv_host="h", metrics_port=1)
KSERVES_OWN = "request_predict_seconds"
OPEN_METRICS = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}


def front_end() -> Any:
    """One with a worker, behind its edge with an API key, and a route for all that it must have."""

    async def fetch(host: str, port: int) -> str:
        return "# HELP baton_worker_orphans x\n# TYPE baton_worker_orphans gauge\nbaton_worker_orphans 1\n"

    metrics = FleetMetrics(lambda: (WORKER,), lambda: (), "a", fetch)  # type: ignore[arg-type,return-value]
    app = Starlette(routes=[Route("/metrics", metrics, methods=["GET"])])
    app.router.routes += [Route(path, lambda _: PlainTextResponse("served")) for path in server.REQUIRED]
    edge = Edge(app, max_body_bytes=1000, api_keys=["key"], reception=Reception(AdmissionSettings()))
    return SimpleNamespace(app=app, asgi=edge, llm=SimpleNamespace(cluster=SimpleNamespace(fleet=None)))


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> tuple[server.Server, TestClient]:
    """A predictor with KServe's routes and middlewares, and no front end yet."""
    app = fastapi.FastAPI()
    monkeypatch.setattr("kserve.model_server.app", app)
    monkeypatch.setattr(server, "app", app)

    async def nothing() -> Any:
        """Start or stop."""

    made = server.Server(
        BatonModel("m"), nothing, nothing, host="", prefix="", max_body_bytes=1000, grace_s=1, with_grpc=False
    )
    RESTServer("", made.dataplane, made.model_repository_extension, 0).create_application()
    return made, TestClient(app)


def test_a_scrape_tells_of_the_fleet_once_there_is_one(predictor: tuple[server.Server, TestClient]) -> None:
    """Before, of the process; then of front ends and workers, KServe's own families included, without an API key."""
    made, client = predictor
    before = client.get("/metrics").text
    assert KSERVES_OWN in before and "front_end=" not in before
    made._attach(front_end())
    after = client.get("/metrics").text
    assert f"# TYPE {KSERVES_OWN} histogram" in after
    assert 'python_info{front_end="a",' in after
    assert 'baton_worker_orphans{worker="w1",pool="decode"} 1' in after
    assert client.post("/metrics").status_code == 405
    assert client.get("/v2/models").json() == {"models": []}


def test_a_scraper_may_prefer_open_metrics(predictor: tuple[server.Server, TestClient]) -> None:
    """It gets the plain format, and is told so: in the other one vLLM's names would lose their colon."""
    made, client = predictor
    made._attach(front_end())
    answer = client.get("/metrics", headers=OPEN_METRICS)
    assert answer.headers["content-type"] == CONTENT_TYPE_LATEST
    assert "# EOF" not in answer.text
