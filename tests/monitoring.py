"""A real Prometheus with Baton's rules over what a test serves, a real Alertmanager, and a webhook that it tells."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts.prometheus_rule import SOURCE
from tests.conftest import free_port

ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")

needs_servers = pytest.mark.skipif(
    not (shutil.which("prometheus") and ALERTMANAGER),
    reason="needs Prometheus and Alertmanager (Debian's packages prometheus and prometheus-alertmanager)",
)


@dataclass
class Monitoring:
    """The running servers.

    Attributes:
        client: asks Prometheus.
        came: the messages that the webhook got.
    """

    client: httpx.Client
    came: list[dict[str, Any]]

    def get(self, path: str, **params: str) -> Any:
        """What Prometheus answers below `/api/v1`; None while it is not there."""
        try:
            return self.client.get(f"/api/v1/{path}", params=params).json()["data"]
        except (httpx.HTTPError, KeyError, ValueError):
            return None

    def ask(self, query: str) -> list[float]:
        """The values of a query, one for each series."""
        found = self.get("query", query=query)
        return [float(series["value"][1]) for series in found["result"]] if found else []

    def up(self) -> bool:
        """Whether the last scrape of the target was understood."""
        found = self.get("targets")
        return bool(found) and [target["health"] for target in found["activeTargets"]] == ["up"]

    def names(self) -> set[str]:
        """The names of all series that were scraped."""
        return set(self.get("label/__name__/values") or ())

    def alerts(self, name: str) -> list[dict[str, Any]]:
        """The alerts of this name that reached the webhook."""
        return [one for message in self.came for one in message["alerts"] if one["labels"]["alertname"] == name]


@contextmanager
def monitored(folder: Path, target: str, labels: dict[str, str] | None = None) -> Iterator[Monitoring]:
    """The servers, scraping HOST:PORT every second and giving what they find these labels, as a PodMonitor would."""
    assert ALERTMANAGER is not None
    port, alert_port = free_port(), free_port()
    with ExitStack() as stack:
        hook, came = stack.enter_context(_webhook())
        prometheus, alertmanager = _configure(folder, {"targets": [target], "labels": labels or {}}, alert_port, hook)
        stack.enter_context(
            _running(
                ALERTMANAGER,
                f"--config.file={alertmanager}",
                f"--storage.path={folder / 'alerts'}",
                f"--web.listen-address=127.0.0.1:{alert_port}",
                "--cluster.listen-address=",
            )
        )
        stack.enter_context(
            _running(
                "prometheus",
                f"--config.file={prometheus}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            )
        )
        yield Monitoring(stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}")), came)


@contextmanager
def _running(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def _webhook() -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A receiver of alerts: its port, and what came."""
    came: list[dict[str, Any]] = []

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


def _configure(folder: Path, target: dict[str, Any], alertmanager: int, hook: int) -> tuple[Path, Path]:
    """The two servers' configuration files."""
    prometheus = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(SOURCE)],
        "scrape_configs": [{"job_name": "baton", "static_configs": [target]}],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]},
    }
    routing = {
        "route": {"receiver": "hook", "group_wait": "0s", "group_interval": "1s"},
        "receivers": [{"name": "hook", "webhook_configs": [{"url": f"http://127.0.0.1:{hook}/"}]}],
    }
    files = folder / "prometheus.yaml", folder / "alertmanager.yaml"
    for file, content in zip(files, (prometheus, routing), strict=True):
        file.write_text(yaml.safe_dump(content))
    return files
