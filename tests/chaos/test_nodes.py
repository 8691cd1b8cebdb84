"""A node of the Ray cluster is lost with the worker on it: its streams go on elsewhere. Two nodes on one machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from runtime.app import application
from runtime.config import parse
from tests.chaos.streams import stream
from tests.conftest import ROOT, free_port, wait_for
from tests.pools import ROLES, Pools

TOKENS = 150
SETTINGS: dict[str, Any] = {
    **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
    "decode": {"num_cpus": 0, "resources": {"other": 0.01}},
    "transport": {"lease_s": 600},
    "simulator": {"step_base_s": 0.05},
}
OTHER: dict[str, Any] = {"num_cpus": 0, "resources": {"other": 1}, "node_ip_address": "127.0.0.1"}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, str]]:
    """A cluster whose second node has nothing but the decode worker, and the URL of Baton on it."""
    monkeypatch.setenv("RAY_process_group_cleanup_enabled", "1")
    head = {"num_cpus": 8, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster, port = Cluster(initialize_head=True, head_node_args=head), free_port()
    cluster.add_node(**OTHER)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(parse(SETTINGS)), name="baton", route_prefix="/")
    yield cluster, f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_costs_no_stream(cluster: tuple[Cluster, str]) -> None:
    """The decode worker's node dies in the middle of streams: all are whole; a new node gets a new worker."""
    nodes, url = cluster
    pools, prompts = Pools(), [f"{number} and so on" for number in range(4)]
    before = pools.engines("decode")
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(len(prompts)) as threads:
        expected = [stream(client, prompt, TOKENS) for prompt in prompts]
        far = threading.Event()
        streams = [
            threads.submit(stream, client, prompt, TOKENS, lambda count: far.set() if count > 20 else None)
            for prompt in prompts
        ]
        assert far.wait(60)
        (node,) = nodes.worker_nodes
        nodes.remove_node(node, allow_graceful=False)
        assert not any(each.done() for each in streams)
        assert [each.result(120) for each in streams] == expected
        nodes.add_node(**OTHER)
        assert wait_for(lambda: len(now := pools.engines("decode")) == 1 and now != before, 120)
        assert wait_for(lambda: client.get("/health").status_code == 200, 60)
        assert stream(client, prompts[0], TOKENS) == expected[0]
    assert not pools.wait_until_free(5)
    assert sum(pools.state(role)["leases_expired"] for role in ROLES) == 0
