"""A real Prometheus scrapes Baton's figures, KEDA's query answers what the policy said, an alert reaches a webhook.

In this process and within seconds; `tests/elastic/test_monitoring.py` does it with `baton serve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from runtime.client_view import ClientView
from runtime.metrics import WORKERS_LOST
from runtime.policy.demand import PoolLoad
from runtime.policy.scaling_records import Answer, FleetLoad, PoolAnswer
from runtime.pool_metrics import PoolMetrics
from runtime.reports import FleetStatus
from tests.conftest import wait_for
from tests.monitoring import monitored, needs_servers

pytestmark = needs_servers

KEDA_QUERY = 'max(baton_pool_desired_replicas{pool="decode"})'


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
    registry.register(PoolMetrics(cluster, SimpleNamespace(believed=lambda: status)))  # type: ignore[arg-type]
    registry.register(WORKERS_LOST)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_scrape_a_query_and_an_alert(tmp_path: Path) -> None:
    """From counters in this process to a message in a webhook, through the real servers."""
    labels = {"baton_name": "m", "baton_revision": "v1"}
    with exporter() as port, monitored(tmp_path, f"127.0.0.1:{port}", labels) as monitoring:
        assert wait_for(lambda: monitoring.ask(KEDA_QUERY) == [3.0], 60)
        assert wait_for(lambda: len(monitoring.ask("baton_workers_lost_total")) == 2, 30)
        WORKERS_LOST.labels(pool="decode").inc(4)
        assert wait_for(lambda: bool(monitoring.came), 60)
    (alert,) = monitoring.alerts("BatonWorkersRestarting")[:1]
    assert alert["labels"].items() >= {"pool": "decode", **labels}.items()
    assert alert["annotations"]["summary"].startswith("m v1: ")
    assert alert["annotations"]["summary"].endswith("decode workers were lost within a quarter of an hour")
