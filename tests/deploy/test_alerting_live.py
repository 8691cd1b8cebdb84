"""A real Prometheus scrapes Baton's figures, KEDA's query answers what the policy said, an alert reaches a webhook."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from runtime.client_view import ClientView
from runtime.metrics import WORKERS_LOST
from runtime.policy.demand import PoolLoad
from runtime.policy.scaling_records import Answer, FleetLoad, PoolAnswer
from runtime.pool_metrics import PoolMetrics
from runtime.reports import FleetStatus
from scripts.prometheus_rule import SOURCE
from tests.conftest import free_port, wait_for

ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and ALERTMANAGER),
    reason="needs Prometheus and Alertmanager (Debian's packages prometheus and prometheus-alertmanager)",
)

KEDA_QUERY = 'max(baton_pool_desired_replicas{pool="decode"})'


@contextmanager
def running(*command: str) -> Iterator[None]:
    """A server in the background."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def webhook() -> Iterator[tuple[int, list[Any]]]:
    """A receiver of alerts: its port, and what came."""
    came: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, came
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def exporter() -> Iterator[int]:
    """Baton's own collectors, with a decision of three decode workers."""
    pools = (PoolLoad(ready=1), PoolLoad(ready=2, starting=1))
    answer = Answer(PoolAnswer(1, "steady", ""), PoolAnswer(3, "tokens", ""))
    cluster: Any = SimpleNamespace(
        fleet=SimpleNamespace(workers={}), seen=ClientView(), ledger=SimpleNamespace(oldest_s=lambda: 0.0)
    )
    status = FleetStatus(FleetLoad(0.0, *pools), answer, scaled=True)
    registry = CollectorRegistry()
    registry.register(PoolMetrics(cluster, SimpleNamespace(status=status)))  # type: ignore[arg-type]
    registry.register(WORKERS_LOST)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def configure(folder: Path, target: int, alertmanager: int, receiver: int) -> tuple[Path, Path]:
    """The two servers' configuration files."""
    prometheus = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(SOURCE)],
        "scrape_configs": [{"job_name": "baton", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]},
    }
    routing = {
        "route": {"receiver": "hook", "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "hook", "webhook_configs": [{"url": f"http://127.0.0.1:{receiver}/"}]}],
    }
    files = folder / "prometheus.yaml", folder / "alertmanager.yaml"
    for file, content in zip(files, (prometheus, routing), strict=True):
        file.write_text(yaml.safe_dump(content))
    return files


def test_a_scrape_a_query_and_an_alert(tmp_path: Path) -> None:
    """From counters in this process to a message in a webhook, through the real servers."""
    port, alert_port = free_port(), free_port()
    assert ALERTMANAGER is not None
    with ExitStack() as stack:
        target = stack.enter_context(exporter())
        receiver, came = stack.enter_context(webhook())
        prometheus_file, alertmanager_file = configure(tmp_path, target, alert_port, receiver)
        stack.enter_context(
            running(
                ALERTMANAGER,
                f"--config.file={alertmanager_file}",
                f"--storage.path={tmp_path / 'alerts'}",
                f"--web.listen-address=127.0.0.1:{alert_port}",
                "--cluster.listen-address=",
            )
        )
        stack.enter_context(
            running(
                "prometheus",
                f"--config.file={prometheus_file}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            )
        )
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}"))

        def answer(query: str) -> list[float]:
            try:
                found = client.get("/api/v1/query", params={"query": query}).json()["data"]["result"]
            except (httpx.HTTPError, KeyError, ValueError):
                return []
            return [float(series["value"][1]) for series in found]

        assert wait_for(lambda: answer(KEDA_QUERY) == [3.0], 60)
        assert wait_for(lambda: len(answer("baton_workers_lost_total")) == 2, 30)
        WORKERS_LOST.labels(pool="decode").inc(4)
        assert wait_for(lambda: bool(came), 60)
    alert = came[0]["alerts"][0]
    assert alert["labels"]["alertname"] == "BatonWorkersRestarting"
    assert alert["labels"]["pool"] == "decode"
    assert alert["annotations"]["summary"].endswith("decode workers were lost within a quarter of an hour")
