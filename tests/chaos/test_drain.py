"""Workers that are to go, on real Ray Serve: rolling update, Ctrl-C. No stream notices."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import MODEL, ROOT, Server, baton_serve, free_port, wait_for
from tests.pools import ROLES, Pools  # before Ray, which reads when it is imported how its clusters are closed

# isort: split
import ray
from ray import serve

from runtime.app import application
from runtime.config_file import parse

SETTINGS: dict[str, Any] = {
    **yaml.safe_load((ROOT / "deploy/config/sim.yaml").read_text()),
    "prefill": {"replicas": 2},
    "decode": {"replicas": 2},
    "transport": {"lease_s": 600},
    "limits": {"drain_s": 8, "retry_budget": 0},  # so that a worker that is lost loses its streams
    "simulator": {"step_base_s": 0.05},
}
LENGTHS = [20, 40, 80, 250]  # tokens; the last takes longer than a worker may take to drain
CLIENTS = len(LENGTHS)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Server]:
    """`baton serve` with two simulated workers a pool; a lost leg fails its request."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    with baton_serve(path) as server:
        yield server


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same on a Ray cluster behind Serve's proxy, as it is deployed where it is updated; its URL."""
    monkeypatch.setenv("RAY_process_group_cleanup_enabled", "1")
    port = free_port()
    ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(parse(SETTINGS)), name="baton", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def stream(url: str, prompt: list[int], tokens: int) -> str:
    """The text of a stream, which must end properly."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    text, done = "", False
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "choices" in event, line
                text += event["choices"][0]["text"]
            done = done or line == "data: [DONE]"
    assert done
    return text


def under_load(url: str, change: Callable[[], object]) -> int:
    """Make `change` while clients stream; each stream must be whole and right. Returns how many there were."""
    prompts = [list(range(2000 + i, 2300 + i)) for i in range(CLIENTS)]
    calm, count = threading.Event(), [0]
    with ThreadPoolExecutor(CLIENTS) as threads:
        expected = list(threads.map(lambda p, n: stream(url, p, n), prompts, LENGTHS))

        def work(number: int) -> None:
            while not calm.is_set():
                assert stream(url, prompts[number], LENGTHS[number]) == expected[number]
                count[0] += 1

        clients: list[Future[None]] = [threads.submit(work, number) for number in range(CLIENTS)]
        try:
            change()
        finally:
            calm.set()
        for client in clients:
            client.result(120)
    return count[0]


def test_a_rolling_restart_of_every_worker_loses_nothing(cluster: str) -> None:
    """A changed setting replaces every worker and the front end while clients stream; none of them notices."""
    pools = Pools()
    assert wait_for(lambda: all(len(pools.engines(role)) == 2 for role in ROLES), 60)
    before = {role: set(pools.engines(role)) for role in ROLES}
    changed = parse({**SETTINGS, "env": {"BATON_TEST_CHANGE": "1"}})

    def update() -> None:
        serve.run(application(changed), name="baton", route_prefix="/")
        assert wait_for(
            lambda: all(len(now := set(pools.engines(role))) == 2 and not now & before[role] for role in ROLES), 300
        )

    streams = under_load(cluster, update)
    print(f"{streams} streams")
    assert streams >= CLIENTS
    assert not pools.wait_until_free(5)
    assert pools.state("prefill")["leases_expired"] == 0


def test_ctrl_c_lets_streams_finish(started: Server) -> None:
    """The first Ctrl-C takes no new request, and those that run end whole."""
    expected = stream(started.url, [5000, 5001], 80)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(stream, started.url, [5000, 5001], 80)
        assert wait_for(lambda: started.metric("baton_pool_streams") > 0, 30)
        os.kill(started.process.pid, signal.SIGINT)
        assert running.result(60) == expected
        assert started.process.wait(60) == 0


def test_a_second_ctrl_c_does_not_wait(started: Server) -> None:
    """Whoever is in a hurry gets the terminal back within seconds."""
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(stream, started.url, [5000, 5001], 3000)
        assert wait_for(lambda: started.metric("baton_pool_streams") > 0, 30)
        asked = time.monotonic()
        os.kill(started.process.pid, signal.SIGINT)
        time.sleep(1)
        os.kill(started.process.pid, signal.SIGINT)
        assert started.process.wait(30) == 0
        assert time.monotonic() - asked < 20
        assert running.exception(30) is not None
