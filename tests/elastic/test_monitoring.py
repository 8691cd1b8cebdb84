"""A real Prometheus over `baton serve` and an Alertmanager behind it: metrics, KEDA's query, an alert that fires."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator

import pytest

from benchmarks.elastic import Phase, Run, run
from kserve_adapter.manifest.pools import DESIRED, QUEUE
from kserve_adapter.manifest.presets import PRESETS
from kserve_adapter.manifest.render import render
from runtime.config_file import parse
from runtime.metric_reference import VLLM, families, series_of
from tests.conftest import Server, wait_for
from tests.deploy.rules.scaling import queries
from tests.elastic.test_elastic import REAL_ENGINES_ONLY, WITH_A_GPU_ONLY
from tests.monitoring import Monitoring, monitored, needs_servers

pytestmark = needs_servers

REPLACED_S = 300.0


def keda_queries(metric: str) -> dict[str, str]:
    """What the manifests have KEDA ask of this metric, by pool."""
    settings = PRESETS["standard-keda"]
    by = {"signal": "desired" if metric == DESIRED else "queue"}
    config = parse({**settings, "kubernetes": {**settings["kubernetes"], **by}}, "keda")
    asked = [query for query in queries(render(config)) if metric in query]
    return {re.findall(r'pool="(\w+)"', query)[0]: query for query in asked}


@pytest.fixture(scope="module")
def monitoring(elastic: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitoring]:
    """Scrapes the server as a PodMonitor would, with the labels that the manifests' queries ask for."""
    labels = dict(re.findall(r'(baton_\w+)="([^"]*)"', keda_queries(DESIRED)["decode"]))
    folder = tmp_path_factory.mktemp("monitoring")
    with monitored(folder, elastic.url.removeprefix("http://"), labels) as servers:
        assert wait_for(servers.up, 60)
        yield servers


def test_every_documented_metric_has_data(elastic: Server, monitoring: Monitoring) -> None:
    """Each family of docs/metrics.md, in Prometheus; a scrape that it can't read would leave it without any."""
    asyncio.run(run(elastic.url, [Phase(3, 2.0)]))
    own = {name: family.kind for name, family in families().items() if name not in WITH_A_GPU_ONLY}
    theirs = {name: kind for name, (kind, _, _) in VLLM.items() if not name.startswith(REAL_ENGINES_ONLY)}
    expected = {series for name, kind in (own | theirs).items() for series in series_of(name, kind)}
    wait_for(lambda: expected <= monitoring.names(), 60)
    assert not expected - monitoring.names()
    assert monitoring.up()


def test_kedas_queries_answer_what_the_policy_says(elastic: Server, monitoring: Monitoring) -> None:
    """Those of the manifests, while a load asks for more workers: the number that Ray Serve follows, and the queue."""

    def grown(so_far: Run) -> bool:
        return bool(so_far.samples) and so_far.samples[-1]["decode"]["desired"] >= 2

    def agree(metric: str) -> bool:
        pools = elastic.client.get("/baton/fleet").json()["pools"]
        said = {
            pool: state["answer"]["workers"] if metric == DESIRED else state["load"]["queued_requests"]
            for pool, state in pools.items()
        }
        return {pool: monitoring.ask(query) for pool, query in keda_queries(metric).items()} == {
            pool: [float(number)] for pool, number in said.items()
        }

    seen = asyncio.run(run(elastic.url, [Phase(120, 2.0, grown)]))
    assert not seen.failed and grown(seen)
    assert wait_for(lambda: agree(DESIRED), 30)
    assert wait_for(lambda: agree(QUEUE), 30)
    assert monitoring.ask(f'max_over_time({DESIRED}{{pool="decode"}}[5m]) >= 2')


@pytest.mark.timeout(1500)
def test_an_alert_fires(elastic: Server, monitoring: Monitoring) -> None:
    """Three decode workers are killed one after the other: who carries the pager hears of it, with the right words."""

    def calm() -> bool:
        state = elastic.client.get("/baton/fleet").json()["pools"]["decode"]
        return bool(state["load"]["ready"] == state["answer"]["workers"] == 1 and not state["load"]["draining"])

    assert wait_for(calm, REPLACED_S)  # who drains is not lost
    lost = 'max(baton_workers_lost_total{pool="decode"})'
    (before,) = monitoring.ask(lost)
    assert not monitoring.alerts("BatonWorkersRestarting")
    for kill in range(3):
        assert wait_for(lambda: elastic.client.get("/health").status_code == 200, REPLACED_S)
        (victim, *_) = elastic.pids("decode")
        os.kill(victim, signal.SIGKILL)
        assert wait_for(lambda kill=kill: monitoring.ask(lost) == [before + kill + 1], REPLACED_S)  # type: ignore[misc]
    assert wait_for(lambda: bool(monitoring.alerts("BatonWorkersRestarting")), 60)
    (alert, *_) = monitoring.alerts("BatonWorkersRestarting")
    assert alert["status"] == "firing"
    assert alert["labels"]["pool"] == "decode"
    assert alert["annotations"]["summary"].endswith("decode workers were lost within a quarter of an hour")
    assert wait_for(lambda: elastic.client.get("/health").status_code == 200, REPLACED_S)
